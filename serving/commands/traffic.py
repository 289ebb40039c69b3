"""`serving promote | canary | shadow | label | rollback | unload | load | keep`: who gets a model's traffic.

They write the models folder, on this machine, and wait until every running server serves what was asked for. Where one
can't, the change is taken back and the exit status is 1.
"""

from __future__ import annotations

import inspect
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from serving.commands.options import Models, Name, NoWait, StateDir, Version, Why, seconds, up_to_date
from serving.commands.output import explained
from serving.deploy import commands
from serving.deploy.commands import Order
from serving.errors import GenerationConflict, InvalidRequest, NotReady, ServingError
from serving.repository import servers
from serving.repository.traffic import sentence
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import describe

WAIT_S = 150.0
End = Annotated[bool, typer.Option("--end", help="End it.")]
_RULES: dict[str, Any] = {
    "after_s": Annotated[str | None, typer.Option("--after", metavar="TIME", help="Judge it after 90s, 10m, 2h.")],
    "rows": Annotated[int | None, typer.Option(help="Judge it after so many rows.")],
    "error_rate": Annotated[
        float | None, typer.Option("--max-error-rate", help="Share of predictions that may fail [default: 0.01].")
    ],
    "latency_ratio": Annotated[
        float | None, typer.Option("--max-latency-ratio", help="Most times the other version's mean latency.")
    ],
    "agreement": Annotated[
        float | None, typer.Option("--min-agreement", help="Share of rows with the same label as stable, 0 to 1.")
    ],
    "accuracy_loss": Annotated[
        float | None, typer.Option("--max-accuracy-loss", help="How much less often than stable it may be right.")
    ],
}
"""How a change is judged: options by the names that the rules of a judgement have."""


def _option(name: str, kind: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


_WHICH = _option("name", Name, inspect.Parameter.empty)
_WHERE = (
    _option("why", Why, ""),
    _option("models", Models, Path("models")),
    _option("state_dir", StateDir),
    _option("no_wait", NoWait, default=False),
)


def _command(make: Callable[..., Order], *rules: str) -> Callable[..., None]:
    """Make a command of what makes an order: which model, why and where are options of each.

    rules: those that the change may be judged by.
    """

    def command(**given: Any) -> None:
        name, models, state_dir, no_wait = (given.pop(option) for option in ("name", "models", "state_dir", "no_wait"))
        with explained():
            if rules:
                given["judge"] = _judged({rule: given.pop(rule) for rule in rules})
            models, state_dir = up_to_date(models, state_dir, name)
            carry_out(models, state_dir, name, make(**given), no_wait=no_wait)

    taken = inspect.signature(make, eval_str=True).parameters.values()
    own = (one.replace(kind=one.KEYWORD_ONLY) for one in taken if one.kind is not one.VAR_KEYWORD)
    options = (_WHICH, *own, *(_option(rule, _RULES[rule]) for rule in rules), *_WHERE)
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__name__, command.__doc__ = make.__name__, make.__doc__
    return command


def promote(version: Version, **given: Any) -> Order:
    """Make a version stable: it answers all requests that name no version."""
    return made(commands.Promote, version=version, **given)


def canary(
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="The candidate.")] = None,
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
    version: Annotated[str | None, typer.Argument(metavar="VERSION", help="The shadow.")] = None,
    percent: Annotated[float, typer.Option(help="Share of the requests that are copied to it.")] = 100.0,
    end: End = False,
    **given: Any,
) -> Order:
    """Give a version copies of live requests on spare capacity, and compare its answers: see `serving status`."""
    one_of(version, end)
    return made(commands.StartShadow, version=version, percent=percent, **given)


def label(
    label: Annotated[str, typer.Argument(metavar="LABEL", help="Such as blue.")],
    version: Annotated[str | None, typer.Argument(metavar="VERSION")] = None,
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
    waited = servers.Waiting(root, name, after.generation, seconds=WAIT_S, state_dir=state_dir).wait()
    problems = waited.problems
    if not problems:
        said = f"{name}: {facts} (generation {after.generation}"
        # It stands: a server that hangs must not keep the others from going back.
        typer.echo(f"{said}; {_known(waited, f'{said})')})")
        return
    try:
        store.revert(name, after, who=who, why="; ".join(problems))
        rest = "what served before goes on"
    except GenerationConflict:
        rest = "a later change stands"
    raise ServingError(f"{order.what} of {name} is not served: {'; '.join(problems)}; {rest}")


def served(
    root: Path, state_dir: Path | None, name: str, generation: int, said: str, *, version: str | None = None
) -> str:
    """Wait until every running server has taken a change; return how many serve it.

    said: what stands all the same. Raises NotReady where one can't, or where that is not known of all.
    """
    waited = servers.Waiting(root, name, generation, seconds=WAIT_S, state_dir=state_dir, version=version).wait()
    if waited.problems:
        raise NotReady(f"{said}; {'; '.join(waited.problems)}")
    return _known(waited, said)


def _known(waited: servers.Waited, said: str) -> str:
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


def _judged(rules: dict[str, Any]) -> dict[str, Any] | None:
    """Make the rules of a judgement from options; None where none is wanted. Raises InvalidRequest."""
    given = {rule: value for rule, value in rules.items() if value is not None}
    if given and not given.keys() & {"after_s", "rows"}:
        raise InvalidRequest("--after or --rows must say when to decide")
    if "after_s" in given:
        given["after_s"] = seconds("--after", given["after_s"])
    return given or None


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


# Nobody answers beside stable, to agree with, and only a canary's answers are somebody's, to turn out right.
COMMANDS = (
    _command(promote, *tuple(_RULES)[:-2]),
    _command(canary, *_RULES),
    _command(shadow, *tuple(_RULES)[:-1]),
    *(_command(make) for make in (label, rollback, unload, load, keep)),
)
