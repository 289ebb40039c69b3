"""What each operator does to the rows of a batch: the rules of `batch_graph`.

Sources: the operators of ONNX (github.com/onnx/onnx/blob/main/docs/Operators.md, Operators-ml.md) and of onnxruntime
(ContribOperators.md). An operator that is not here is not known to keep rows apart, and its model runs each request
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.engine.batch_graph import FREE, SIZE, Node, Rows, Rule, Rules, State
from serving.engine.batch_sizes import SIZES
from serving.tensors import count

MS = "com.microsoft"
ML = "ai.onnx.ml"


def _elementwise(node: Node) -> Sequence[State]:
    """Each element of the output comes of the elements at its place."""
    rows = node.aligned(range(len(node.inputs)), node.rank_out())
    if rows is not None and rows.padding is not None and node.kind != "Identity":
        raise node.doubt("computes with what fills shorter rows")
    return [rows or FREE]


def _cast_like(node: Node) -> Sequence[State]:
    """Cast to the type of the second input, whatever that holds."""
    return [FREE if node.state(0) is FREE else node.rows(0)]


def _shape(node: Node) -> Sequence[State]:
    """Shape, Size: tell how many rows there are."""
    if isinstance(rows := node.state(0), Rows) and rows.padding is not None:
        raise node.doubt("counts how long the longest row of the batch is")
    return [SIZE]


def _dropout(node: Node) -> Sequence[State]:
    """Do nothing, as it should once a model is trained."""
    training = node.constant(2) if node.opset >= 12 else node.opset < 7 and not node.attribute("is_test", 0)
    if training is not None and bool(training):
        raise node.doubt("answers differently each time")
    return [node.state(0) or FREE]


def _first(node: Node) -> Sequence[State]:
    """Elementwise in the first input; all others are settings."""
    node.need_free(*range(1, len(node.inputs)))
    return [node.rows(0)]


def _reshaped(node: Node) -> Sequence[State]:
    """Reshape, Flatten, Squeeze, Unsqueeze: the elements in their order."""
    if not isinstance(node.state(0), Rows) or any(isinstance(s, Rows) for s in node.inputs[1:]):
        raise node.doubt("takes a shape from the rows")
    state = node.state(0)
    assert isinstance(state, Rows)  # noqa: S101  told to mypy
    return [node.reshaped(state)]


def _along(default: int | None = None, *, name: str = "axis", of_input: int | None = None) -> Rule:
    """Compute along one axis, which must not be that of the rows; it stays, or its length changes."""

    def rule(node: Node) -> Sequence[State]:
        rows = node.rows(0)
        given = node.constant(of_input) if of_input is not None else None
        value = int(given.ravel()[0]) if given is not None else node.attribute(name, default)
        node.need_free(*(i for i in range(1, len(node.inputs)) if i != of_input))
        if value is None or node.axis(int(value), node.rank(0)) == rows.axis:
            raise node.mixes
        return [rows]

    return rule


def _softmax(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    if node.opset < 13 and not node.domain:  # over this axis and all that follow
        if node.axis(node.attribute("axis", 1), node.rank(0)) <= rows.axis:
            raise node.mixes
    elif node.axis(node.attribute("axis", -1), node.rank(0)) == rows.axis:
        raise node.mixes
    return [rows]


def _layer_norm(node: Node) -> Sequence[State]:
    """Normalise over an axis and all that follow."""
    rows = node.rows(0)
    node.need_free(*range(1, len(node.inputs)))
    if node.axis(node.attribute("axis", -1), node.rank(0)) <= rows.axis:
        raise node.mixes
    return [rows]


def _skip_layer_norm(node: Node) -> Sequence[State]:
    rows = node.aligned((0, 1), node.rank(0))
    node.need_free(*range(2, len(node.inputs)))
    if rows is None or rows.padding is not None or rows.axis >= node.rank(0) - 1:
        raise node.mixes
    return [rows]


def _mean_variance(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    if rows.axis in [node.axis(a, node.rank(0)) for a in node.attribute("axes", [0, 2, 3])]:
        raise node.mixes
    return [rows]


def _axes(node: Node) -> list[int] | None:
    given = node.constant(1) if len(node.inputs) > 1 else None
    axes = given.ravel().tolist() if given is not None else node.attribute("axes")
    return None if axes is None else [node.axis(int(a), node.rank(0)) for a in axes]


def _reduced(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    axes = _axes(node)
    if not axes:
        if node.attribute("noop_with_empty_axes", 0):
            return [rows]
        raise node.mixes
    if rows.axis in axes:
        raise node.mixes
    kept = bool(node.attribute("keepdims", 1))
    return [Rows(rows.axis if kept else rows.axis - sum(a < rows.axis for a in axes), rows.stride)]


def _arg(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    axis = node.axis(node.attribute("axis", 0), node.rank(0))
    if axis == rows.axis:
        raise node.mixes
    return [Rows(rows.axis - (axis < rows.axis and not node.attribute("keepdims", 1)), rows.stride)]


def _transposed(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    order = node.attribute("perm", list(range(node.rank(0)))[::-1])
    return [Rows(list(order).index(rows.axis), rows.stride)]


def _multiplied(node: Node, *, turned: tuple[bool, bool] = (False, False)) -> Sequence[State]:
    """Multiply matrices: one of them has no rows, or both have them in front of the matrix. turned: transposed."""
    found: list[Rows] = []
    for index in (0, 1):
        if node.state(index) is FREE:
            continue
        rows = node.rows(index, None if isinstance(node.state(index), Rows) else 0)
        own, other = node.rank(index), node.rank(1 - index)
        from_end = own - rows.axis
        summed = 1 + (index ^ turned[index])
        if own < 2 or from_end == summed:
            raise node.mixes
        if from_end <= 2:
            if node.state(1 - index) is not FREE:
                raise node.mixes
            from_end = 2 - index
        rank_out = node.rank_out()
        if other == 1:  # a vector: the axis that it is summed over is gone
            from_end = 1 if from_end <= 2 else from_end - 1
        found.append(Rows(rank_out - from_end, rows.stride))
    if len(set(found)) != 1:
        raise node.mixes
    return found[:1]


def _matmul(node: Node) -> Sequence[State]:
    node.need_free(*range(2, len(node.inputs)))
    return _multiplied(node)


def _fused_matmul(node: Node) -> Sequence[State]:
    if node.attribute("transBatchA", 0) or node.attribute("transBatchB", 0):
        raise node.doubt("turns the batch")
    return _multiplied(node, turned=(bool(node.attribute("transA", 0)), bool(node.attribute("transB", 0))))


def _qlinear(node: Node) -> Sequence[State]:
    """QLinearAdd, QLinearMul: a, its scale and zero, b, its scale and zero, those of c."""
    node.need_free(1, 2, 4, 5, 6, 7)
    return [node.aligned((0, 3), node.rank_out()) or FREE]


def _qlinear_matmul(node: Node) -> Sequence[State]:
    """QLinearMatMul: a, its scale and zero, b, its scale and zero, those of y."""
    node.need_free(*range(1, len(node.inputs)))
    rows = node.rows(0)
    if rows.axis == node.rank(0) - 1:
        raise node.mixes
    return [Rows(rows.axis + node.rank_out() - node.rank(0), rows.stride)]


def _gemm(node: Node) -> Sequence[State]:
    (found,) = _multiplied(node, turned=(bool(node.attribute("transA", 0)), bool(node.attribute("transB", 0))))
    if node.state(2) not in (None, FREE) and node.aligned((2,), 2) != found:
        raise node.mixes
    return [found]


def _images(node: Node) -> Sequence[State]:
    """Convolve, pool: [rows, channels, ...]."""
    node.need_free(*range(1, len(node.inputs)))
    rows = node.rows(0, 0)
    if node.rank(0) < 3 or node.shapes_out()[0][:1] != node.shapes(0)[0][:1]:
        raise node.doubt("does not take its rows as images")
    if node.kind == "MaxPool" and node.outputs > 1:
        raise node.doubt("gives places in the whole batch")
    return [rows]


def _batch_norm(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    node.need_free(*range(1, len(node.inputs)))
    trains = node.attribute("training_mode", 0) or node.attribute("is_test", 1) == 0 or node.outputs > 1
    if trains or rows.axis == 1 or node.attribute("spatial", 1) == 0:
        raise node.mixes
    return [rows]


def _resized(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    if any(isinstance(state, Rows) for state in node.inputs[1:]):
        raise node.doubt("takes a size from the rows")
    if rows.stride != 1 or [s[rows.axis] for s in node.shapes(0)] != [s[rows.axis] for s in node.shapes_out()]:
        raise node.mixes
    if node.attribute("coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
        raise node.doubt("crops")
    if node.attribute("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise node.doubt("takes one scale for all axes")
    # A scale of 1.01 leaves a few rows as they are, and not a hundred.
    given = node.constant(2 if node.kind == "Resize" and node.opset >= 11 else 1)
    scales = node.attribute("scales", []) if given is None else given.ravel().tolist()
    places = [node.axis(a, node.rank(0)) for a in node.attribute("axes", range(node.rank(0)))]
    if any(axis == rows.axis and scale != 1 for axis, scale in zip(places, scales, strict=False)):
        raise node.mixes
    return [rows]


def _grid_sample(node: Node) -> Sequence[State]:
    return [node.alike((0, 1))]


def _concatenated(node: Node) -> Sequence[State]:
    rank = node.rank_out()
    rows = node.aligned(range(len(node.inputs)), rank)
    if rows is None or rows.padding is not None:
        raise node.mixes
    # Behind each other they are all rows, some times over.
    behind = node.axis(node.attribute("axis", 1), rank) == rows.axis
    if behind and not all(isinstance(state, Rows) for state in node.inputs):
        raise node.doubt("puts what is no row behind rows")
    return [rows]


_ENDLESS = 10**9
"""As far, or further, do exporters slice where they mean all; no batch has so many rows."""


def _sliced(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    if node.opset < 10:
        ends = node.attribute("ends", [])
        starts, axes, steps = node.attribute("starts", []), node.attribute("axes", list(range(len(ends)))), None
    else:
        node.need_free(*range(1, len(node.inputs)))
        number = node.shapes(1)[0][0]
        starts, ends = ([] if range_ is None else range_.ravel().tolist() for range_ in map(node.constant, (1, 2)))
        given = node.constant(3)
        axes = given.ravel().tolist() if given is not None else list(range(number))
        stepped = node.constant(4)
        steps = stepped.ravel().tolist() if stepped is not None else None
    places = [node.axis(int(a), node.rank(0)) for a in axes]
    if rows.axis in places:
        at = places.index(rows.axis)
        step = 1 if steps is None else int(steps[at])
        if step != 1 or starts[at] != 0 or ends[at] < _ENDLESS:
            raise node.doubt("takes some of the rows")
    return [rows]


def _gathered(node: Node) -> Sequence[State]:
    data, indices = node.state(0), node.state(1)
    axis = node.axis(node.attribute("axis", 0), node.rank(0))
    if data is FREE and indices is not None and indices is not FREE:
        rows = node.rows(1)
        return [Rows(axis + rows.axis, rows.stride)]
    if indices is not FREE:
        raise node.mixes
    rows = node.rows(0)
    if rows.axis == axis:
        raise node.doubt("takes some of the rows")
    return [Rows(rows.axis if rows.axis < axis else rows.axis + node.rank(1) - 1, rows.stride)]


def _gathered_elements(node: Node) -> Sequence[State]:
    """Pick, in each row, elements of the same row."""
    rows = node.rows(0)
    if node.rows(1) != rows or node.axis(node.attribute("axis", 0), node.rank(0)) == rows.axis:
        raise node.mixes
    return [rows]


def _gathered_nd(node: Node) -> Sequence[State]:
    batch = node.attribute("batch_dims", 0)
    if node.state(0) is FREE and not batch:
        rows = node.rows(1)
        if rows.axis == node.rank(1) - 1:
            raise node.mixes
        return [rows]
    rows = node.rows(0)
    if node.rows(1) != rows or rows.axis >= batch:
        raise node.mixes
    return [rows]


def _expanded(node: Node) -> Sequence[State]:
    """Expand, Tile: repeat along other axes than that of the rows."""
    rows = node.rows(0)
    if any(isinstance(state, Rows) for state in node.inputs[1:]):
        raise node.doubt("takes a shape from the rows")
    moved = Rows(rows.axis + node.rank_out() - node.rank(0), rows.stride)
    if [s[rows.axis] for s in node.shapes(0)] != [s[moved.axis] for s in node.shapes_out()]:
        raise node.doubt("repeats the rows")
    return [moved]


def _padded(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    if node.opset < 11:
        pads, axes = list(node.attribute("pads", node.attribute("paddings", []))), None
    else:
        given = node.constant(1)
        pads = given.ravel().tolist() if given is not None else []
        chosen = node.constant(3)
        axes = chosen.ravel().tolist() if chosen is not None else None
        node.need_free(2)
    places = [node.axis(int(a), node.rank(0)) for a in axes] if axes is not None else list(range(node.rank(0)))
    if rows.axis in places:
        at = places.index(rows.axis)
        if pads[at] or pads[at + len(places)]:
            raise node.doubt("pads the rows with others")
    return [rows]


def _one_hot(node: Node) -> Sequence[State]:
    node.need_free(1, 2)
    rows = node.rows(0)
    axis = node.axis(node.attribute("axis", -1), node.rank(0) + 1)
    return [Rows(rows.axis + (axis <= rows.axis), rows.stride)]


def _recurrent(node: Node) -> Sequence[State]:
    """RNN, GRU, LSTM: [steps, rows, features] or, with layout 1, [rows, steps, features]."""
    across = bool(node.attribute("layout", 0))
    node.need_free(1, 2, 3, 7, *range(8, len(node.inputs)))
    rows = node.alike((0, 5, 6), 0 if across else 1)
    if node.state(4) is not None and node.rows(4, 0).stride != 1:
        raise node.mixes
    if rows.stride != 1:
        raise node.doubt("takes merged rows")
    last = Rows(0 if across else 1)
    return [Rows(0 if across else 2), last, last]


def _reversed(node: Node) -> Sequence[State]:
    rows = node.rows(0, node.attribute("batch_axis", 1))
    if node.rows(1, 0).stride != rows.stride:
        raise node.mixes
    return [rows]


def _einsum(node: Node) -> Sequence[State]:
    equation = node.attribute("equation", b"").decode().replace(" ", "")
    terms, _, result = equation.partition("->")
    parts = terms.split(",")
    if not result or "." in equation:
        raise node.doubt("has an equation that is not known here")
    letters = set()
    strides = set()
    for index, part in enumerate(parts):
        if node.state(index) is not FREE:
            rows = node.rows(index)
            letters.add(part[rows.axis])
            strides.add(rows.stride)
            if part.count(part[rows.axis]) != 1:
                raise node.mixes
    if len(letters) != 1 or len(strides) != 1:
        raise node.mixes
    (letter,) = letters
    free = [part for index, part in enumerate(parts) if node.state(index) is FREE]
    if letter not in result or any(letter in part for part in free):
        raise node.mixes
    return [Rows(result.index(letter), strides.pop())]


def _table(node: Node) -> Sequence[State]:
    """Classical models, [rows, features]: each row is one example."""
    node.need_free(*range(1, len(node.inputs)))
    if node.rank(0) < 2:
        raise node.doubt("takes a single dimension as one example")
    return [node.rows(0, 0)]


def _one_hot_encoder(node: Node) -> Sequence[State]:
    """Add an axis at the end."""
    return [node.rows(0)]


def _feature_vectorizer(node: Node) -> Sequence[State]:
    if any(node.rank(index) < 2 for index in range(len(node.inputs))):
        raise node.doubt("takes a single dimension as one example")
    return [node.alike(range(len(node.inputs)))]


def _array_features(node: Node) -> Sequence[State]:
    """Pick from the last axis, by a flat list of places."""
    if node.state(0) is FREE:
        rows = node.rows(1)
        strides = {count(shape[rows.axis + 1 :]) * rows.stride for shape in node.shapes(1)}
        if len(strides) != 1:
            raise node.mixes
        return [Rows(node.rank_out() - 1, strides.pop())]
    node.need_free(1)
    rows = node.rows(0)
    if rows.axis == node.rank(0) - 1:
        raise node.mixes
    return [rows]


def _string_normalizer(node: Node) -> Sequence[State]:
    if node.attribute("stopwords"):
        raise node.doubt("leaves out words, and its rows are words")
    return [node.rows(0)]


def _tokenizer(node: Node) -> Sequence[State]:
    rows = node.rows(0)
    return [Rows(rows.axis, rows.stride, node.attribute("pad_value", b""))]


def _tfidf(node: Node) -> Sequence[State]:
    """Count terms in each row; what fills shorter rows must be no part of a term."""
    state = node.state(0)
    if not isinstance(state, Rows) or (state.axis, state.stride, node.rank(0)) != (0, 1, 2):
        raise node.doubt("takes a single dimension as one example")
    if state.padding is not None and state.padding in (node.attribute("pool_strings") or [state.padding]):
        raise node.doubt("counts what fills shorter rows")
    return [Rows(0)]


def _quantised_now(node: Node) -> Sequence[State]:
    """Scale and zero come of all rows: the walk notes that (`dynamic_quantisation`)."""
    return [node.rows(0), FREE, FREE]


def _attention(node: Node) -> Sequence[State]:
    """[rows, tokens, hidden] and a mask [rows, ...]; no past."""
    given = [index for index in range(1, len(node.inputs)) if node.state(index) not in (None, FREE)]
    if any(node.rank(index) < 2 for index in given):
        raise node.doubt("has a mask that is not known here")
    rows = node.alike((0, *given))
    if rows.stride != 1 or node.outputs > 1:
        raise node.doubt("keeps a past")
    return [rows]


def _scaled_attention(node: Node) -> Sequence[State]:
    """Attention of ONNX itself: queries, keys and values [rows, ...], and what masks or precedes them, by row too."""
    given = [index for index in range(len(node.inputs)) if index < 3 or node.state(index) not in (None, FREE)]
    if 3 in given and node.rank(3) != 4:  # a smaller mask begins with another axis
        raise node.mixes
    return [node.alike(given)]


def _embedded(node: Node) -> Sequence[State]:
    """EmbedLayerNormalization: ids and segments [rows, tokens], weights, a mask and positions [rows, tokens]."""
    node.need_free(2, 3, 4, 5, 6)
    return [node.alike([0, *(index for index in (1, 7, 8) if node.state(index) not in (None, FREE))])]


def _distances(node: Node) -> Sequence[State]:
    """CDist: from each row to each of others."""
    rows = node.rows(0, 0)
    node.need_free(1)
    return [rows]


def _matrices(node: Node) -> Sequence[State]:
    """Compute on the last two axes."""
    rows = node.rows(0)
    node.need_free(*range(1, len(node.inputs)))
    if rows.axis >= node.rank(0) - 2:
        raise node.mixes
    return [rows]


def _words(text: str) -> list[str]:
    return text.split()


_ELEMENTWISE = _words(
    """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil
    Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf
    IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu
    Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt StringConcat Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
    """
)
_FIRST = ("DequantizeLinear", "QuantizeLinear", "RegexFullMatch")
_REDUCED = _words("""ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare""")
_IMAGES = _words("""AveragePool Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
GroupNormalization InstanceNormalization LRN LpPool MaxPool QLinearConv SpaceToDepth""")
_TABLE = _words("""ai.onnx.ml::Imputer ai.onnx.ml::LinearClassifier ai.onnx.ml::LinearRegressor ai.onnx.ml::Normalizer
ai.onnx.ml::SVMClassifier ai.onnx.ml::SVMRegressor ai.onnx.ml::Scaler ai.onnx.ml::TreeEnsemble
ai.onnx.ml::TreeEnsembleClassifier ai.onnx.ml::TreeEnsembleRegressor ai.onnx.ml::ZipMap""")

RULES = Rules(
    by_kind={
        **dict.fromkeys(_ELEMENTWISE, _elementwise),
        **dict.fromkeys((f"{MS}::{kind}" for kind in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")), _elementwise),
        **dict.fromkeys((f"{ML}::{kind}" for kind in ("Binarizer", "CategoryMapper", "LabelEncoder")), _elementwise),
        **dict.fromkeys(_FIRST, _first),
        **dict.fromkeys((f"{MS}::{kind}" for kind in ("DequantizeLinear", "QuantizeLinear")), _first),
        **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshaped),
        **dict.fromkeys(("Shape", "Size"), _shape),
        **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), _softmax),
        **dict.fromkeys(_REDUCED, _reduced),
        **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
        **dict.fromkeys(_IMAGES, _images),
        **dict.fromkeys(_TABLE, _table),
        **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _layer_norm),
        f"{MS}::SkipLayerNormalization": _skip_layer_norm,
        **dict.fromkeys(("GRU", "LSTM", "RNN", f"{MS}::DynamicQuantizeLSTM"), _recurrent),
        **dict.fromkeys(("Expand", "Tile"), _expanded),
        **dict.fromkeys(("Resize", "Upsample"), _resized),
        **dict.fromkeys(("Det", "Trilu"), _matrices),
        **dict.fromkeys(("MatMul", "MatMulInteger", f"{MS}::DynamicQuantizeMatMul"), _matmul),
        **dict.fromkeys((f"{MS}::QLinearAdd", f"{MS}::QLinearMul"), _qlinear),
        **dict.fromkeys((f"{MS}::QLinearLeakyRelu", f"{MS}::QLinearSigmoid"), _first),
        **dict.fromkeys((f"{MS}::QLinearAveragePool", f"{MS}::QLinearGlobalAveragePool"), _images),
        f"{MS}::MatMulIntegerToFloat": _matmul,
        f"{MS}::FusedMatMul": _fused_matmul,
        f"{MS}::FusedConv": _images,
        f"{MS}::FusedGemm": _gemm,
        f"{MS}::Attention": _attention,
        f"{MS}::MultiHeadAttention": _attention,
        f"{MS}::EmbedLayerNormalization": _embedded,
        f"{MS}::CDist": _distances,
        "Attention": _scaled_attention,
        f"{MS}::Tokenizer": _tokenizer,
        f"{ML}::OneHotEncoder": _one_hot_encoder,
        f"{ML}::FeatureVectorizer": _feature_vectorizer,
        f"{ML}::ArrayFeatureExtractor": _array_features,
        "BatchNormalization": _batch_norm,
        "CastLike": _cast_like,
        "Concat": _concatenated,
        "CumSum": _along(of_input=1),
        "Dropout": _dropout,
        "DynamicQuantizeLinear": _quantised_now,
        "Einsum": _einsum,
        "Gather": _gathered,
        "GatherElements": _gathered_elements,
        "GatherND": _gathered_nd,
        "Gemm": _gemm,
        "GridSample": _grid_sample,
        "LpNormalization": _along(-1),
        "MeanVarianceNormalization": _mean_variance,
        "OneHot": _one_hot,
        "Pad": _padded,
        "QLinearMatMul": _qlinear_matmul,
        "ReverseSequence": _reversed,
        "Slice": _sliced,
        "Split": _along(0),
        "StringNormalizer": _string_normalizer,
        "TfIdfVectorizer": _tfidf,
        "TopK": _along(-1),
        "Transpose": _transposed,
    },
    of_sizes=SIZES,
    unrepeatable=frozenset(
        _words("Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike")
    ),
    dynamic_quantisation=frozenset(
        ("DynamicQuantizeLinear", f"{MS}::DynamicQuantizeLSTM", f"{MS}::DynamicQuantizeMatMul")
    ),
)
