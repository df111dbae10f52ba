"""The `orch` command. Parses, calls, prints; every decision is made elsewhere, and imported where it is needed."""

import difflib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from orchestrator import __version__, use_cli
from orchestrator.errors import LaunchError, OrchError
from orchestrator.options import ANY_RUN, CONFIG, CONTEXT, DETACH, JSON, OVERRIDES, RUN, STAGES

if TYPE_CHECKING:
    from orchestrator.compose import Composed
    from orchestrator.run import Run


class Ordered(click.Group):
    """Commands in the order of their definition; an OrchError becomes `error:`, `hint:` and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, first defined first."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command, or say which one was meant."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"did you mean `orch {near[0]}`?" if near else "`orch --help` lists the commands"
            raise click.UsageError(f"no command `{args[0]}`; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; report what the user can put right without a traceback."""
        try:
            return super().invoke(ctx)
        except OrchError as error:
            _say_error(error)
            ctx.exit(1)
        except BrokenPipeError:
            raise  # `orch ... | head`: click leaves quietly
        except OSError as error:
            _say_error(OrchError(str(error), hint="is the disk full, or the folder another user's?"))
            ctx.exit(1)


def _say_error(error: OrchError) -> None:
    _say("error:", "red", str(error))
    if error.hint:
        _say("hint:", "cyan", error.hint)


def _say(word: str, color: str, text: str) -> None:
    from orchestrator.show import pasteable

    plain = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style(word, fg=color, bold=True)} {pasteable(text)}", err=True, color=plain)


@click.group(cls=Ordered, context_settings=CONTEXT)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default="runs",
    show_default=True,
    envvar="ORCH_RUNS",
    show_envvar=True,
    help="Folder of the runs.",
)
@click.option("-v", "--verbose", count=True, help="Say more of what is done; twice for debugging.")
@click.version_option(__version__, "-V", "--version", prog_name="orch")
@click.pass_context
def cli(ctx: click.Context, runs: Path, verbose: int) -> None:
    """Plan, submit, follow and resume large training runs.

    \b
    Start here:
      orch init .                          copy a set of configs to begin with
      orch plan configs/demo.yaml          will it fit, how long, how much
      orch submit configs/demo.yaml        start its stages and watch them
      orch status                          what runs where, at which step

    RUN is `experiment/stage`, or `experiment` for all its stages.
    """
    ctx.obj = runs.expanduser().absolute()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("orchestrator").setLevel(logging.DEBUG if verbose else logging.INFO)
    if verbose > 1:
        logging.getLogger().setLevel(logging.DEBUG)


@cli.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def init(folder: Path) -> None:
    """Copy the configs that come with orch into FOLDER/configs.

    Describe your own cluster in `cluster/mine.yaml`; then `cluster=mine` selects it.
    """
    from orchestrator.compose import copy_presets

    files = copy_presets(folder)
    for file in files:
        click.echo(file)
    _next(shlex.join(["orch", "plan", str(folder / "configs" / "demo.yaml")]))


@cli.command()
@CONFIG
@OVERRIDES
@click.option("--why", "key", metavar="KEY", help="Say which file or override set KEY.")
@JSON
def show(config: str, overrides: Sequence[str], key: str | None, as_json: bool) -> None:
    """Print the composed config.

    CONFIG is a YAML file or the name of a preset, such as `gpt3-175b`. KEY=VALUE overrides what it says;
    a group is swapped by name: `cluster=h100-80g`, `model=gpt3-13b`.
    """
    from orchestrator.compose import compose

    if key and as_json:
        raise click.UsageError("`--why` does not go with `--json`", click.get_current_context())
    composed = compose(config, overrides)
    if key:
        click.echo(composed.why(key))
    elif as_json:
        from orchestrator.show import experiment_json

        experiment_json(composed.experiment)
    else:
        click.echo(composed.yaml, nl=False)


@cli.command()
@click.argument("config", required=False)
@OVERRIDES
@STAGES
@click.option("--force", is_flag=True, help="Print the estimate although it does not fit.")
@click.option("--search", is_flag=True, help="Look for the best layouts.")
@click.option(
    "--for", "goal", type=click.Choice(["speed", "money", "nodes"]), default="speed", show_default=True,
    help="What --search makes best: time, GPU-hours, or the fewest nodes that fit.",
)  # fmt: skip
@click.option("--gpus", type=click.IntRange(1), metavar="N", help="How many GPUs --search may use.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="How many layouts to list.")
@click.option("--what-if", "what_if", multiple=True, metavar="'KEY=VALUE ...'", help="Compare with this; may repeat.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write pictures: X.html or X.png.")
@click.option("--compare", metavar="RUN", help="Planned and measured, of a run; takes no CONFIG.")
@click.option("--calibrate", type=click.Path(dir_okay=False, path_type=Path), help="Write what --compare measured.")
@JSON
@click.pass_obj
def plan(root: Path, config: str | None, overrides: Sequence[str], stages: Sequence[str], **how: Any) -> None:
    """Check a config, and estimate memory, time and cost. Says from which checkpoints a submit would go on.

    \b
    Examples:
      orch plan configs/gpt3-175b.yaml --search --gpus 1024
      orch plan configs/gpt3-13b.yaml --what-if cluster=h200
      orch plan configs/gpt3-13b.yaml --report plan.html
      orch plan --compare gpt3-13b/pretrain --calibrate configs/cluster/measured.yaml
    """
    from orchestrator import planning

    _refuse_idle({"config": config, "stages": stages, **how})
    if how["compare"]:
        planning.compare(root, how["compare"], how["calibrate"], as_json=how["as_json"])
        return
    if not config:
        raise click.UsageError("Missing argument 'CONFIG'.")
    if how["search"]:
        planning.search(config, overrides, stages, **{k: how[k] for k in ("goal", "gpus", "top", "as_json")})
    elif how["what_if"]:
        planning.what_if(config, overrides, stages, how["what_if"], as_json=how["as_json"])
    else:
        planning.plan(root, config, overrides, stages, **{k: how[k] for k in ("force", "report", "as_json")})
        if not how["as_json"]:
            _next(_submission(config, overrides, stages, force=how["force"]))


@cli.command()
@CONFIG
@OVERRIDES
@STAGES
@click.option("--launcher", metavar="NAME", help="Where to run, such as `local`. Default: `cluster.launcher`.")
@click.option("--dry-run", is_flag=True, help="Write the run folders, start nothing.")
@click.option("--preflight", is_flag=True, help="Slurm: look at the nodes first, and go without the sick ones.")
@click.option("--rehearse", is_flag=True, help="Slurm: jobs of the real shape, whose ranks say where they stand.")
@click.option("--force", is_flag=True, help="Submit although the estimate does not fit.")
@DETACH
@click.pass_obj
def submit(
    root: Path,
    config: str,
    overrides: Sequence[str],
    detach: bool,
    dry_run: bool,
    preflight: bool,
    rehearse: bool,
    **how: Any,
) -> None:
    """Check a config, start its stages and watch them.

    A stage that waits for another starts when that one is done. Submitting again goes on where the experiment
    stands. Ctrl-C asks the runs to save and stop; a second one leaves them to it.

    \b
    Examples:
      orch submit configs/demo.yaml
      orch submit configs/demo.yaml stages.pretrain.steps=1000 name=demo-long
      orch submit configs/demo.yaml --stage prepare --detach
    """
    from orchestrator.submit import preview
    from orchestrator.submit import submit as hand_over

    composed = _compose(config, overrides, how["stages"])
    runs = hand_over(composed, root=root, dry_run=dry_run, preflight=preflight, rehearse=rehearse, **how)
    if dry_run:
        for run in runs:
            click.echo(run.folder)
            click.echo(preview(run, how["launcher"]), nl=False)
        click.echo("nothing was started", err=True)
        _next(_submission(config, overrides, **how))
    elif runs:
        if (preflight or rehearse) and not detach:
            _look_ahead(runs)
        if not rehearse:
            _watch(runs, detach)
        elif detach:
            _next(f"orch preflight {runs[0].experiment}")
    else:
        click.echo("all stages are done", err=True)
        _next(f"orch status {composed.experiment.name}", "orch ui")


@cli.command()
@ANY_RUN
@click.option("-w", "--watch", is_flag=True, help="Go on showing how they stand until all have ended, or Ctrl-C.")
@click.option("--markdown", is_flag=True, help="Print the logbook of RUN as Markdown.")
@JSON
@click.pass_obj
def status(root: Path, run: str | None, watch: bool, markdown: bool, as_json: bool) -> None:
    """List the runs, or show one with its logbook.

    Of each: state, step, loss, speed, newest checkpoint, attempts and how they ended, why it waits or failed. The
    logbook has the attempts, what each lost, and the goodput.
    """
    from orchestrator import logbook, show
    from orchestrator.run import find_runs, list_runs
    from orchestrator.status import book, look, row

    def chosen() -> "list[Run]":
        return find_runs(root, run) if run else list_runs(root)

    if markdown and not run:
        raise click.UsageError("`--markdown` needs a RUN")
    if watch and (markdown or as_json):
        raise click.UsageError("`--watch` goes with neither `--markdown` nor `--json`")
    if watch:
        from orchestrator.follow import watch as go_on

        with suppress(KeyboardInterrupt):
            go_on(chosen)
        return
    standings, problem = look(chosen())
    rows = [row(s) for s in standings]
    books = [book(s) for s in standings] if run else []
    if as_json:
        show.as_json([r | b.to_json() for r, b in zip(rows, books, strict=True)] if run else rows)
    elif markdown:
        click.echo("\n".join(logbook.markdown(r["run"], b) for r, b in zip(rows, books, strict=True)), nl=False)
    elif run:
        for s, r, b in zip(standings, rows, books, strict=True):
            show.details(s.run, r, b)
    elif rows:
        show.out().print(show.table(rows), soft_wrap=True)
    else:
        click.echo(f"no runs in `{root}`", err=True)
        _next("orch submit configs/demo.yaml")
    if problem:
        click.echo(f"this is what the run folders say: {problem}", err=True)
    problem = show.reconcile(standings)
    if problem:
        click.echo(f"MLflow was not brought up to date: {problem}", err=True)


@cli.command("list")
@JSON
@click.pass_obj
def list_(root: Path, as_json: bool) -> None:
    """List the experiments and their stages. Asks no scheduler."""
    from orchestrator import show
    from orchestrator.run import list_runs

    found = show.experiments(list_runs(root))
    if as_json:
        show.as_json(found)
        return
    for entry in found:
        click.echo(f"{entry['experiment']}: {' '.join(entry['stages'])}")
    if not found:
        click.echo(f"no runs in `{root}`", err=True)


@cli.command()
@RUN
@JSON
@click.pass_obj
def preflight(root: Path, run: str, as_json: bool) -> None:
    """Show what the newest preflight, and the rehearsal, of a run found."""
    from orchestrator import preflight as ahead
    from orchestrator import show
    from orchestrator.run import find_runs

    found = []
    for place in (root, root / ahead.REHEARSALS):
        with suppress(LaunchError):
            found += ahead.folders(find_runs(place, run))
    if not found:
        raise LaunchError(f"nothing has looked ahead for `{run}`", hint="`orch submit CONFIG --preflight` does")
    reports = [(folder, ahead.await_report(folder)) for folder in found]
    if as_json:
        show.as_json([{"folder": str(folder), **report} for folder, report in reports])
    else:
        for folder, report in reports:
            ahead.show(folder, report)
    if not all(report["passed"] for _, report in reports):
        sys.exit(1)


@cli.command()
@RUN
@click.option("--rank", metavar="N|all", default="0", show_default=True, help="Rank whose log to print, or all.")
@click.option("--attempt", metavar="NAME|all", help="An earlier attempt, or all; `orch status RUN` lists them.")
@click.option("-f", "--follow", is_flag=True, help="Go on printing as the log grows, through requeues, to the end.")
@click.pass_obj
def logs(root: Path, run: str, rank: str, attempt: str | None, follow: bool) -> None:
    """Print the log of a run.

    With several ranks or attempts, each line begins with the attempt and the rank it is of.
    """
    from orchestrator.follow import ALL, Tail, no_log
    from orchestrator.run import find_runs

    if rank != ALL and not rank.isdecimal():
        raise click.BadParameter(f"`{rank}` is neither a number nor `all`", param_hint="--rank")
    which = None if rank == ALL else int(rank)
    runs = find_runs(root, run)
    tail = Tail(runs, sys.stdout, rank=which, attempt=attempt)
    with suppress(KeyboardInterrupt):
        if not (tail.follow() if follow else tail.print()):
            raise no_log(runs, rank=which, attempt=attempt)


@cli.command()
@RUN
@OVERRIDES
@click.option("--force", is_flag=True, help="Go on although the estimate of the new layout does not fit.")
@DETACH
@click.pass_obj
def resume(root: Path, run: str, overrides: Sequence[str], force: bool, detach: bool) -> None:
    """Start what stopped or failed again, from its newest checkpoint.

    It goes on with the config and the code it began with, as the same run in MLflow. KEY=VALUE may change
    how it is laid out: the stage's engine and `parallel`, and the cluster; the checkpoint is converted.

    \b
    Examples:
      orch resume demo
      orch resume demo/pretrain stages.pretrain.engine=deepspeed stages.pretrain.parallel.zero=3
    """
    from orchestrator.run import find_runs
    from orchestrator.submit import resume as hand_over

    _watch(hand_over(find_runs(root, run), overrides, force=force), detach)


@cli.command()
@CONFIG
@OVERRIDES
@click.option("--engines", default="torch,deepspeed,colossalai", show_default=True, metavar="NAME,...", help="Which.")
@click.option("--layout", "layouts", multiple=True, metavar="KEY=VALUE,...", help="Of `parallel`; may be given again.")
@click.option("--stage", metavar="NAME", help="Which stage. Default: the first that trains.")
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Steps of each.")
@click.option("--tolerance", type=float, metavar="NATS", help="Of the loss. Default: 1e-4 in fp32, 3e-2 in bf16.")
@click.option("--to", "folder", type=click.Path(file_okay=False, path_type=Path), help="New folder of runs and curves.")
@JSON
@click.pass_obj
def parity(root: Path, config: str, overrides: Sequence[str], engines: str, as_json: bool, **how: Any) -> None:
    """Run a config through several engines and layouts, and compare losses, gradient norms and speed.

    Every engine runs in every layout, on this machine, from the same seed over the same samples. The first is
    what the others are held against. Exits with 1 where one fails or is further away than the tolerance.

    \b
    Examples:
      orch parity configs/demo.yaml --engines torch,deepspeed --layout zero=0
      orch parity configs/demo.yaml --layout zero=0 --layout tensor=2 --layout pipeline=2 --steps 10
    """
    from orchestrator import parity as check
    from orchestrator import show

    cases, folder = check.parity(config, overrides, root=root, engines=engines.split(","), **how)
    if as_json:
        show.as_json([vars(case) for case in cases])
    else:
        check.show(cases)
    click.echo(f"curves: {folder / 'curves.png'}", err=True)
    if any(case.result in ("differs", "failed") for case in cases):
        sys.exit(1)


for command in (use_cli.consolidate, use_cli.generate, use_cli.chat, use_cli.lineage, use_cli.export):
    cli.add_command(command)


@cli.command()
@RUN
@click.option("--now", is_flag=True, help="Do not wait for a checkpoint: kill it.")
@click.pass_obj
def cancel(root: Path, run: str, now: bool) -> None:
    """Ask a run to save and stop."""
    from orchestrator.run import find_runs
    from orchestrator.submit import cancel as stop

    for r in stop(find_runs(root, run), now=now):
        click.echo(f"`{r.name}` {'was killed' if now else 'was asked to save and stop'}", err=True)
    _next(f"orch status {run}", f"orch resume {run}")


@cli.command()
@ANY_RUN
@click.pass_obj
def sync(root: Path, run: str | None) -> None:
    """Send to MLflow what it has not seen yet, of one run or of all."""
    from orchestrator import track
    from orchestrator.run import find_runs, list_runs
    from orchestrator.submit import alive

    failed = False
    for r in find_runs(root, run) if run else list_runs(root):
        if r.submissions:
            try:
                click.echo(f"{r.name}: {track.sync(r)} steps sent")
                track.reconcile(r, not r.over and alive(r))
            except OrchError as error:  # the others may be tracked elsewhere
                failed = True
                _say_error(type(error)(f"run `{r.name}`: {error}", hint=error.hint))
    if failed:
        sys.exit(1)


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on 127.0.0.1.")
@click.option("--uri", metavar="URI", help="MLflow to show. Default: the one in the runs folder.")
@click.option("--open", "browse", is_flag=True, help="Open a browser too.")
@click.pass_obj
def ui(root: Path, port: int, uri: str | None, browse: bool) -> None:
    """Serve the MLflow dashboard on this machine until Ctrl-C, and print its addresses."""
    import threading

    from orchestrator import dashboard

    click.echo("starting MLflow ...", err=True)
    with dashboard.serve(root, uri, port) as base:
        pages = dashboard.addresses(root, uri, base) or [("all experiments", base)]
        for experiment, address in pages:
            click.echo(f"{experiment}: {address}")
        if browse:
            click.launch(pages[0][1])
        click.echo("Ctrl-C ends it", err=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


@cli.command()
@click.argument("config", required=False)
@OVERRIDES
@click.option("--deep", is_flag=True, help="Import torch, DeepSpeed and MLflow too: half a minute.")
@click.option("--nodes", is_flag=True, help="Slurm: look at the nodes too, in a job of CONFIG's largest stage.")
@click.option("--uri", metavar="URI", help="MLflow to look for. Default: the one in the runs folder.")
@JSON
@click.pass_obj
def doctor(
    root: Path, config: str | None, overrides: Sequence[str], deep: bool, nodes: bool, uri: str | None, as_json: bool
) -> None:
    """Check this machine and its Slurm; with CONFIG, whether that can run here.

    Each finding is ok, a warning or a problem, and has a remedy.
    """
    from orchestrator import doctor as checks
    from orchestrator import show

    if nodes and not config:
        raise click.UsageError("`--nodes` takes a CONFIG, whose job it is", click.get_current_context())
    composed = _compose(config, overrides, ()) if config else None
    findings = checks.examine(root, uri=uri, deep=deep, experiment=composed.experiment if composed else None)
    if nodes and composed:
        findings += checks.nodes(composed, root)
    if as_json:
        show.as_json([vars(f) for f in findings])
    else:
        checks.report(findings)
    if any(f.level == "problem" for f in findings):
        raise OrchError("something that is needed is missing", hint="the remedies stand beside each finding")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    To use it:
      bash   orch completion bash >> ~/.bashrc
      zsh    orch completion zsh >> ~/.zshrc
      fish   orch completion fish > ~/.config/fish/completions/orch.fish
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script  # noqa: S101 - the three are click's own
    click.echo(script(cli, {}, "orch", "_ORCH_COMPLETE").source())


def _refuse_idle(given: dict[str, Any]) -> None:
    """Refuse options of `orch plan` that would do nothing beside the others."""
    from click.core import ParameterSource

    context = click.get_current_context()
    names = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    said = {"what_if": "--what-if", "goal": "--for"}
    ways = [said.get(way, f"--{way}") for way in ("search", "what_if", "compare") if way in names]
    if len(ways) > 1:
        raise click.UsageError(f"`{ways[0]}` does not go with `{ways[1]}`", context)
    for option, way in {"goal": "search", "gpus": "search", "top": "search", "calibrate": "compare"}.items():
        if option in names and way not in names:
            raise click.UsageError(f"`{said.get(option, f'--{option}')}` goes with `--{way}` alone", context)
    for option in ("report", "force"):
        if ways and option in names:
            raise click.UsageError(f"`--{option}` does not go with `{ways[0]}`", context)
    if given["report"] and given["report"].suffix.lower() not in (".html", ".png"):
        raise click.BadParameter(f"`{given['report']}` is neither X.html nor X.png", context, param_hint="--report")
    if "compare" in names and (given["config"] or given["stages"]):
        raise click.UsageError("`--compare` takes a RUN, and neither CONFIG nor `--stage`", context)


def _compose(config: str, overrides: Sequence[str], stages: Sequence[str]) -> "Composed":
    """The experiment, once its stages are known to be there."""
    from orchestrator.compose import compose
    from orchestrator.submit import select

    composed = compose(config, overrides)
    select(composed.experiment, stages)
    return composed


def _watch(runs: Sequence["Run"], detach: bool) -> None:
    """Follow ``runs`` to their end, unless ``detach``; exit with 1 unless all are done."""
    from orchestrator.follow import follow
    from orchestrator.show import deliver, ends

    click.echo("submitted " + ", ".join(f"`{r.name}`" for r in runs), err=True)
    if detach or not follow(runs):
        name = runs[0].experiment
        _next(f"orch status {name}", f"orch logs -f {name}", f"orch cancel {name}")
        return
    deliver(runs)
    if not ends(runs):
        sys.exit(1)


def _look_ahead(runs: Sequence["Run"]) -> None:
    """Show what is found ahead of ``runs``, as it is found; exit with 1 if they may not start."""
    from orchestrator import preflight as ahead

    for folder in ahead.folders(runs):
        report = ahead.await_report(folder)
        ahead.show(folder, report)
        if not report["passed"]:
            sys.exit(1)


def _submission(
    config: str, overrides: Sequence[str], stages: Sequence[str], *, launcher: str | None = None, force: bool = False
) -> str:
    """The `orch submit` for what was planned, as a shell takes it."""
    options = [word for name in stages for word in ("--stage", name)]
    options += ["--launcher", launcher] if launcher else []
    options += ["--force"] if force else []
    return shlex.join(["orch", "submit", config, *overrides, *options])


def _next(*commands: str) -> None:
    """Say what is likely to be typed next."""
    from orchestrator.show import pasteable

    click.echo(pasteable("next: " + ", ".join(f"`{c}`" for c in commands)), err=True)


def main() -> None:
    """Entry point of the console script."""
    cast(Callable[[], None], cli)()


if __name__ == "__main__":
    main()
