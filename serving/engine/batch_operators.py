"""What each operator does to the rows of a batch: the rules by which `batch_graph` walks.

Sources: the operators of ONNX (github.com/onnx/onnx/blob/main/docs/Operators.md, Operators-ml.md) and of onnxruntime
(ContribOperators.md). An operator that is not here is not known to keep rows apart, and its model runs each request
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from serving.engine import batch_moves
from serving.engine.batch_node import FREE, SIZE, Node, Rows, State

Rule: TypeAlias = Callable[[Node], Sequence[State]]
"""Says the state of each output of a node of which an input has rows; fewer states than outputs: the last is theirs."""


def _elementwise(node: Node) -> Sequence[State]:
    """Each element of the output comes of the elements at its place."""
    return [node.aligned(range(len(node.inputs)), node.rank_out())]


def _identity(node: Node) -> Sequence[State]:
    return [node.state(0) or FREE]


def _cast_like(node: Node) -> Sequence[State]:
    """Cast to the type of the second input, whatever that holds."""
    return [FREE if node.state(0) is FREE else node.rows(0)]


def _shape(node: Node) -> Sequence[State]:
    """Shape, Size: tell how many rows there are."""
    node.rows(0)
    return [SIZE]


def _dropout(node: Node) -> Sequence[State]:
    """Do nothing, as it should once a model is trained."""
    if node.state(2) is not None or node.opset < 7:
        raise node.doubt("may answer differently each time")
    return _identity(node)


def _first(node: Node) -> Sequence[State]:
    """Elementwise in the first input; all others are settings."""
    node.need_free_from(1)
    return [node.rows(0)]


def _over(axes: Callable[[Node], Iterable[int]]) -> Rule:
    """Compute over some axes of the first input, which stay, and must not be that of the rows; others are settings."""

    def rule(node: Node) -> Sequence[State]:
        rows = node.rows(0)
        node.need_free_from(1)
        if rows.axis in axes(node):
            raise node.mixes
        return [rows]

    return rule


def _axis(default: int) -> Callable[[Node], Iterable[int]]:
    return lambda node: [node.axis(default)]


def _from_axis_on(node: Node) -> Iterable[int]:
    return range(node.axis(-1), node.rank(0))


def _softmax_axes(node: Node) -> Iterable[int]:
    return [node.axis(-1)] if node.opset >= 13 else range(node.axis(1), node.rank(0))


def _cumulated_axes(node: Node) -> Iterable[int]:
    return [axis % node.rank(0) for axis in node.setting("axis", 1)]


def _batch_norm_axes(node: Node) -> Iterable[int]:
    """The channels' axis; all of them where it trains."""
    trains = node.attribute("training_mode", 0) or node.attribute("is_test", 1) == 0 or node.outputs > 1
    return range(node.rank(0)) if trains or node.attribute("spatial", 1) == 0 else [1]


def _reduced(node: Node) -> Sequence[State]:
    given = node.setting("axes", 1) or []
    if not given and node.attribute("noop_with_empty_axes", 0):
        return [node.rows(0)]
    return _without(node, [axis % node.rank(0) for axis in given] or range(node.rank(0)))


def _arg(node: Node) -> Sequence[State]:
    return _without(node, [node.axis(0)])


def _without(node: Node, axes: Iterable[int]) -> Sequence[State]:
    """Reduce axes to one element, or away."""
    rows = node.rows(0)
    if rows.axis in axes:
        raise node.mixes
    return [rows if node.attribute("keepdims", 1) else rows.moved(-sum(axis < rows.axis for axis in axes))]


def _matmul(node: Node) -> Sequence[State]:
    """Multiply matrices: one of them has no rows, or both have them in front of the matrix; the others are settings."""
    node.need_free_from(2)
    found = set()
    for index in node.dependent((0, 1)):
        rows = node.rows(index)
        from_end = node.rank(index) - rows.axis
        summed = 1 + index  # the last axis of the first matrix, the last but one of the second
        if node.rank(index) < 2 or from_end == summed or (from_end <= 2 and node.state(1 - index) is not FREE):
            raise node.mixes
        if node.rank(1 - index) == 1:  # a vector: the axis that it is summed over is gone
            from_end -= from_end > summed
        found.add(Rows(node.rank_out() - from_end, rows.stride))
    if len(found) != 1:
        raise node.mixes
    return [found.pop()]


def _gemm(node: Node) -> Sequence[State]:
    """Multiply rows by a matrix, and add a vector or rows."""
    node.need_free([1])
    rows = node.rows(0, 0)
    if node.attribute("transA", 0) or (node.dependent([2]) and node.aligned([2], 2) != rows):
        raise node.mixes
    return [rows]


def _images(node: Node) -> Sequence[State]:
    """Convolve, pool: [rows, channels, ...]."""
    node.need_free_from(1)
    rows = node.rows(0, 0)
    if node.rank(0) < 3:
        raise node.doubt("does not take its rows as images")
    if node.kind == "MaxPool" and node.outputs > 1:
        raise node.doubt("gives places in the whole batch")
    return [rows]


def _recurrent(node: Node) -> Sequence[State]:
    """RNN, GRU, LSTM: [steps, rows, features], how many steps each row has, and states [directions, rows, hidden]."""
    node.need_free((1, 2, 3))
    node.need_free_from(7)
    rows = node.alike((0, 5, 6), 1)
    lengths = node.state(4)
    if node.attribute("layout", 0) or rows.stride != 1 or lengths not in (None, Rows(0)):
        raise node.doubt("takes rows in another place than the second axis")
    return [Rows(2), Rows(1), Rows(1)]


def _einsum(node: Node) -> Sequence[State]:
    terms, _, result = node.attribute("equation", b"").decode().replace(" ", "").partition("->")
    if not result or "." in terms + result:
        raise node.doubt("has an equation that is not known here")
    parts = terms.split(",")
    given = node.dependent(range(len(parts)))
    rows = [node.rows(index) for index in given]
    letters = {parts[index][its.axis] for index, its in zip(given, rows, strict=True)}
    if len(letters) != 1 or len({its.stride for its in rows}) != 1:
        raise node.mixes
    (letter,) = letters
    # Each input that has rows has their letter once, no other has it, and it is not summed over.
    if letter not in result or any(part.count(letter) != (index in given) for index, part in enumerate(parts)):
        raise node.mixes
    return [Rows(result.index(letter), rows[0].stride)]


def _table(node: Node) -> Sequence[State]:
    """Classical models, [rows, features]: each row is one example."""
    node.need_free_from(1)
    if node.rank(0) < 2:
        raise node.doubt("takes a single dimension as one example")
    return [node.rows(0, 0)]


def _tables(node: Node) -> Sequence[State]:
    """Several such inputs, side by side."""
    if any(node.rank(index) < 2 for index in range(len(node.inputs))):
        raise node.doubt("takes a single dimension as one example")
    return [node.alike(range(len(node.inputs)))]


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
    """Scale and zero come of all rows: the walk notes that (`DYNAMIC_QUANTISATION`)."""
    return [node.rows(0), FREE, FREE]


_RULES: tuple[tuple[Rule, str], ...] = (
    (
        _elementwise,
        """Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil
        Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN
        LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink
        Sigmoid Sign Sin Sinh Softplus Softsign Sqrt StringConcat Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
        ml.Binarizer ml.CategoryMapper ml.LabelEncoder""",
    ),
    (
        _first,
        "DequantizeLinear QuantizeLinear RegexFullMatch ml.OneHotEncoder ms.DequantizeLinear ms.QuantizeLinear",
    ),
    (_identity, "Identity"),
    (batch_moves.reshaped, "Flatten Reshape Squeeze Unsqueeze"),
    (_shape, "Shape Size"),
    (_over(_softmax_axes), "Hardmax LogSoftmax Softmax"),
    (_over(_from_axis_on), "LayerNormalization RMSNormalization"),
    (_over(_axis(-1)), "LpNormalization TopK"),
    (_over(_axis(0)), "Split"),
    (_over(_cumulated_axes), "CumSum"),
    (_over(_batch_norm_axes), "BatchNormalization"),
    (
        _reduced,
        """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare""",
    ),
    (_arg, "ArgMax ArgMin"),
    (
        _images,
        """AveragePool Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
        GroupNormalization InstanceNormalization LRN LpPool MaxPool SpaceToDepth""",
    ),
    (
        _table,
        """ml.Imputer ml.LinearClassifier ml.LinearRegressor ml.Normalizer ml.SVMClassifier ml.SVMRegressor ml.Scaler
        ml.TreeEnsemble ml.TreeEnsembleClassifier ml.TreeEnsembleRegressor ml.ZipMap ms.CDist""",
    ),
    (_tables, "ml.FeatureVectorizer"),
    (_recurrent, "GRU LSTM RNN ms.DynamicQuantizeLSTM"),
    (batch_moves.expanded, "Expand Tile"),
    (batch_moves.resized, "Resize"),
    (_matmul, "MatMul MatMulInteger"),
    (_gemm, "Gemm"),
    (batch_moves.array_features, "ml.ArrayFeatureExtractor"),
    (_cast_like, "CastLike"),
    (batch_moves.concatenated, "Concat"),
    (_dropout, "Dropout"),
    (_quantised_now, "DynamicQuantizeLinear"),
    (_einsum, "Einsum"),
    (batch_moves.gathered, "Gather"),
    (batch_moves.gathered_elements, "GatherElements"),
    (batch_moves.one_hot, "OneHot"),
    (batch_moves.padded, "Pad"),
    (batch_moves.sliced, "Slice"),
    (_string_normalizer, "StringNormalizer"),
    (_tfidf, "TfIdfVectorizer"),
    (_tokenizer, "ms.Tokenizer"),
    (batch_moves.transposed, "Transpose"),
)


def _operators(names: str) -> list[str]:
    """Name operators as `domain::Kind` where they are not ONNX's own."""
    return names.replace("ml.", "ai.onnx.ml::").replace("ms.", "com.microsoft::").split()


RULES: dict[str, Rule] = {operator: rule for rule, names in _RULES for operator in _operators(names)}
"""By operator."""
UNREPEATABLE = frozenset(
    _operators("Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike")
)
DYNAMIC_QUANTISATION = frozenset(_operators("DynamicQuantizeLinear ms.DynamicQuantizeLSTM"))
"""Take a scale over all rows of a batch when they run; else rows are as independent as their rules say."""
