"""`serving promote | canary | shadow | label | rollback | unload | load | keep`: who gets a model's traffic.

They write the models folder, on this machine, and wait until every running server serves what was asked for. Where one
can't, the change is taken back and the exit status is 1.
"""

from __future__ import annotations

import errno
import inspect
import os
import pwd
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from serving.deploy import commands
from serving.deploy.commands import Order
from serving.deploy.mirror import mirrored
from serving.errors import GenerationConflict, InvalidRequest, NotReady, ServingError
from serving.logs import visible
from serving.repository import servers
from serving.repository.traffic import sentence
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import describe

WAIT_S = 150.0
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model.", show_default=False)]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="One of its versions.", show_default=False)]
Models = Annotated[
    Path, typer.Option("--models", envvar="SERVING_MODELS", help="Folder of models, or s3://, gs://, az://.")
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", envvar="SERVING_STATE_DIR", help="The state folder of its servers.")
]
Why = Annotated[str, typer.Option(help="The reason, for the history.", show_default=False)]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait until the running servers serve it.")]
End = Annotated[bool, typer.Option("--end", help="End it.")]
After = Annotated[str | None, typer.Option(metavar="TIME", help="Judge it, and decide after 90s, 10m, 2h.")]
Rows = Annotated[int | None, typer.Option(help="Judge it, and decide after so many rows.", show_default=False)]
MaxErrors = Annotated[
    float | None, typer.Option("--max-error-rate", help="Share of predictions that may fail, 0 to 1 [default: 0.01].")
]
MaxLatency = Annotated[
    float | None, typer.Option("--max-latency-ratio", help="Most times the other version's mean latency.")
]
MinAgreement = Annotated[
    float | None, typer.Option("--min-agreement", help="Share of rows with the same label as stable, 0 to 1.")
]

MaxAccuracyLoss = Annotated[
    float | None,
    typer.Option("--max-accuracy-loss", help="How far its share of right outcomes may lie below stable's, 0 to 1."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    # Nobody answers beside stable, to agree with, and only a canary's answers are somebody's, to turn out right.
    judging = {promote: _RULES[:-2], canary: _RULES, shadow: _RULES[:-1]}
    makers: tuple[Callable[..., Order], ...] = (promote, canary, shadow, label, rollback, unload, load, keep)
    for make in makers:
        app.command(make.__name__)(_command(make, *judging.get(make, ())))


def _shared(  # noqa: PLR0917  never called: its parameters are options of several commands
    name: Name,
    after: After = None,
    rows: Rows = None,
    max_error_rate: MaxErrors = None,
    max_latency_ratio: MaxLatency = None,
    min_agreement: MinAgreement = None,
    max_accuracy_loss: MaxAccuracyLoss = None,
    why: Why = "",
    models: Models = Path("models"),
    state_dir: StateDir = None,
    no_wait: NoWait = False,
) -> None: ...


_SHARED = inspect.signature(_shared, eval_str=True).parameters
_RULES = ("after", "rows", "max_error_rate", "max_latency_ratio", "min_agreement", "max_accuracy_loss")


def _command(make: Callable[..., Order], *rules: str) -> Callable[..., None]:
    """Make a command of what makes an order: which model, why and where are options of each.

    rules: the options that say how the change is judged.
    """

    def command(**given: Any) -> None:
        name, models, state_dir, no_wait = (given.pop(option) for option in ("name", "models", "state_dir", "no_wait"))
        with explained():
            if rules:
                given["judge"] = judged(**{rule: given.pop(rule) for rule in rules})
            models, state_dir = up_to_date(models, state_dir, name)
            carry_out(models, state_dir, name, make(**given), no_wait=no_wait)

    own = [one for one in inspect.signature(make, eval_str=True).parameters.values() if one.kind is not one.VAR_KEYWORD]
    after = (_SHARED[option] for option in ("why", *rules, "models", "state_dir", "no_wait"))
    options = [one.replace(kind=one.KEYWORD_ONLY) for one in (_SHARED["name"], *own, *after)]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__doc__ = make.__doc__
    return command


def promote(version: Version, **given: Any) -> Order:
    """Make a version stable: it answers all requests that name no version."""
    return made(commands.Promote, version=version, **given)


def canary(
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="The candidate.", show_default=False)] = None,
    percent: Annotated[float, typer.Option(help="Its share of the requests, above 0, at most 100.")] = 10.0,
    sticky_header: Annotated[str | None, typer.Option(help="Header that tells callers apart, such as x-user.")] = None,
    sticky_feature: Annotated[str | None, typer.Option(help="Feature that tells callers apart.")] = None,
    end: End = False,
    **given: Any,
) -> Order:
    """Give a version a share of the requests that name no version; judged, it is promoted or ended by itself."""
    one_of(version, end)
    by = {"header": sticky_header, "feature": sticky_feature}
    sticky = by if any(by.values()) else None
    return made(commands.StartCanary, version=version, percent=percent, sticky=sticky, **given)


def shadow(
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="The shadow.", show_default=False)] = None,
    percent: Annotated[float, typer.Option(help="Share of the requests that are copied to it.")] = 100.0,
    end: End = False,
    **given: Any,
) -> Order:
    """Give a version copies of live requests on spare capacity, and compare its answers: see `serving status`."""
    one_of(version, end)
    return made(commands.StartShadow, version=version, percent=percent, **given)


def label(
    label: Annotated[str, typer.Argument(metavar="LABEL", help="Such as blue.", show_default=False)],
    version: Annotated[str | None, typer.Argument(metavar="VERSION", show_default=False)] = None,
    end: Annotated[bool, typer.Option("--remove", help="Remove the label.")] = False,
    **given: Any,
) -> Order:
    """Point a label at a version: /v1/models/NAME/labels/LABEL:predict."""
    one_of(version, end, "--remove")
    return made(commands.SetLabel, label=label, version=version, **given)


def rollback(**given: Any) -> Order:
    """End the canary, or else go back to the version that was stable before; every trial ends with it."""
    return made(commands.Rollback, **given)


def unload(**given: Any) -> Order:
    """Serve nothing of a model, and hold no memory for it; its files stay."""
    return made(commands.Unload, **given)


def load(**given: Any) -> Order:
    """Serve an unloaded model again."""
    return made(commands.Load, **given)


def keep(
    policy: Annotated[str, typer.Argument(metavar="all|N|V,V...", help="all; 2: the latest two; or 1,2,: these.")],
    **given: Any,
) -> Order:
    """Choose which versions stay loaded besides those with a role: all, the latest N, or V,V,... by name."""
    wanted: Any = policy
    if policy.isdecimal():
        wanted = {"latest": int(policy)}
    elif policy != "all":
        wanted = tuple(version for version in policy.split(",") if version)
    return made(commands.KeepLoaded, keep=wanted, **given)


def up_to_date(
    models: Path, state_dir: Path | None, name: str | None = None, *, is_made: bool = False
) -> tuple[Path, Path | None]:
    """Return the models folder and the state folder: of a repository in an object store those that mirror it here, now.

    name: the model that is looked at; all without it. is_made: a folder that is not there is made by who asks. Raises
    InvalidRequest, and NotReady where there is no such folder.
    """
    found = mirrored(models, state_dir, name, say=lambda text: typer.echo(visible(f"serving: {text}"), err=True))
    if not is_made and not found[0].is_dir():
        raise NotReady(f"there is no models folder {found[0]}: name another with --models")
    return found


def carry_out(root: Path, state_dir: Path | None, name: str, order: Order, *, no_wait: bool) -> None:
    """Write the change, wait until it is served or take it back, and say what came of it."""
    store = TrafficStore(root, state_dir)
    who = user()
    before = store.read(name, anyway=order.anyway)
    step = order.step(store, name)
    after = store.change(name, step.transition, who=who, what=order.said, why=step.why, anyway=order.anyway)
    facts = "; ".join((describe(before, after), *step.notes))
    if no_wait:
        typer.echo(f"{name}: {facts} (generation {after.generation}; not waited for)")
        return
    waited = servers.wait(root, name, after.generation, seconds=WAIT_S, state_dir=state_dir)
    problems = waited.problems
    if not problems:
        said = f"{name}: {facts} (generation {after.generation}"
        # It stands: a server that hangs must not keep the others from going back.
        typer.echo(f"{said}; {known_served(waited, f'{said})')})")
        return
    try:
        store.revert(name, after, who=who, why="; ".join(problems))
        rest = "what served before goes on"
    except GenerationConflict:
        rest = "a later change stands"
    raise ServingError(f"{order.what} of {name} is not served: {'; '.join(problems)}; {rest}")


def known_served(waited: servers.Waited, said: str) -> str:
    """Say how many servers serve it. Raises NotReady where that is not known of all; said: what stands all the same."""
    if waited.unknown:
        raise NotReady(
            f"{said}; it is not known whether every server serves it: "
            f"{'; '.join(f'{one.host} (process {one.pid}) {one.unheard}' for one in waited.unknown)}"
        )
    count = waited.serving
    return f"{count} {'server serves' if count == 1 else 'servers serve'} it" if count else "no server is known here"


def user() -> str:
    """Return the name of the operating system's user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def judged(
    *,
    after: str | None,
    rows: int | None,
    max_error_rate: float | None,
    max_latency_ratio: float | None,
    min_agreement: float | None = None,
    max_accuracy_loss: float | None = None,
) -> dict[str, Any] | None:
    """Make the rules of a judgement from options; None where none is wanted. Raises InvalidRequest."""
    rules = {
        "after_s": None if after is None else seconds(after),
        "rows": rows,
        "error_rate": max_error_rate,
        "latency_ratio": max_latency_ratio,
        "agreement": min_agreement,
        "accuracy_loss": max_accuracy_loss,
    }
    given = {key: value for key, value in rules.items() if value is not None}
    if given and after is None and rows is None:
        raise InvalidRequest("--after or --rows must say when to decide")
    return given or None


def seconds(text: str) -> float:
    """Read a time such as 90s, 10m, 1.5h, 2d. Raises InvalidRequest."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if found is None:
        raise InvalidRequest(f"--after: {text[:40]!r} is no time: write 90s, 10m, 2h or 1d")
    return float(found[1]) * _UNITS[found[2]]


def one_of(version: str | None, end: bool, flag: str = "--end") -> None:
    """Refuse neither and both."""
    if (version is None) != end:
        raise InvalidRequest(f"give a version, or {flag}" if version is None else f"give a version or {flag}, not both")


def made(kind: Callable[..., Order], **fields: Any) -> Order:
    """Make an order. Raises InvalidRequest with a sentence that names the field."""
    try:
        return kind(**fields)
    except ValidationError as error:
        raise InvalidRequest(sentence(error.errors(include_url=False)[0])) from None


@contextmanager
def explained(undone: int = 1) -> Iterator[None]:
    """Turn what is refused into one line and an exit status: 2 for a bad request, else `undone`."""
    try:
        yield
    except ServingError as error:
        Console(stderr=True, highlight=False, markup=False).print(visible(f"serving: {error.message}"), soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, InvalidRequest) else undone) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # who reads the output has seen enough
            raise
        said = f"serving: {error.filename or 'the output'}: {(error.strerror or str(error)).lower()}"
        Console(stderr=True, highlight=False, markup=False).print(visible(said), soft_wrap=True)
        raise typer.Exit(undone) from None
