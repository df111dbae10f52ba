"""Use what a run has learned: `orch generate` and `orch chat`.

The model answers in a process of its own (jobs/runtime/serve.py), since nothing here imports torch.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from orchestrator.errors import CheckpointError, DataError, OrchError
from orchestrator.run import Run, find_runs

log = logging.getLogger(__name__)

Ask = Callable[..., Iterator[dict[str, Any]]]
AVERAGE = "ema"  # below a checkpoint of PPO
NEW = "/new"  # what a user says to begin another conversation


class Gone(OrchError):
    """The process that holds the model has ended: nothing more can be asked."""


def run_of(root: Path, name: str) -> Run:
    """The one run ``name`` means. Raises LaunchError for none, OrchError for several."""
    runs = find_runs(root, name)
    if len(runs) > 1:
        names = ", ".join(f"`{r.name}`" for r in runs)
        raise OrchError(f"`{name}` has {len(runs)} runs: {names}", hint="name one of them")
    return runs[0]


def language_model(run: Run, step: int | None, *, average: bool = False, hashes: bool = False) -> Path:
    """The checkpoint of ``step``, or the newest that is whole: by the sizes of its files, or by their ``hashes`` too.

    ``average``: the moving average of its weights, which PPO keeps in a folder below.

    Raises:
        CheckpointError: there is none, or it is damaged, or of a model that writes no text.
    """
    from jobs.runtime import checkpoint
    from jobs.runtime.job import Ranks
    from orchestrator.consolidate import checkpoint_of

    stage = run.spec().stages[run.stage]
    if stage.kind == "reward":
        base = f": `{run.experiment}/{stage.init_from}`" if stage.init_from else ""
        raise CheckpointError(
            f"`{run.name}` is a reward model: it gives scores and writes no text",
            hint=f"name the run it began with{base}, or one trained against it",
        )
    checkpoint_of(run, step)  # where there is none, it says so
    steps = checkpoint.committed(run.checkpoints) if step is None else [step]
    for found in steps:
        folder = checkpoint.folder_of(run.checkpoints, found)
        if not (problem := checkpoint.damage(folder, Ranks(), hashes=hashes)):
            return _average(folder) if average else folder
        log.warning("checkpoint `%s` is damaged and is passed over: %s", folder, problem)
    which = f"the checkpoint of step {step}" if step is not None else f"every one of {len(steps)} checkpoints"
    raise CheckpointError(f"`{run.name}`: {which} is damaged", hint="restore it, or choose another with `--step`")


def _average(checkpoint: Path) -> Path:
    if not (checkpoint / AVERAGE).is_dir():
        raise CheckpointError(
            f"`{checkpoint}` has no average of the weights",
            hint="a stage `ppo` keeps one, unless its `options.ema` is null; leave `--average` out",
        )
    return checkpoint / AVERAGE


@contextmanager
def serving(run: Run, checkpoint: Path) -> Iterator[Ask]:
    """A process that holds the model; what is asked of it gives its messages up to `done`.

    Raises:
        OrchError: the model cannot be loaded; on a request, it cannot be answered.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.runtime.serve", str(run.folder), str(checkpoint)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for us, and ends it below
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert process.stdin and process.stdout  # noqa: S101

    def message() -> dict[str, Any]:
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise Gone(f"the model of `{run.name}` went away", hint="what it said last stands above")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise OrchError(said["error"], hint=said["hint"])
        return said

    def ask(**request: Any) -> Iterator[dict[str, Any]]:
        with suppress(BrokenPipeError):  # then there is no message either
            process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        while "done" not in (said := message()):
            yield said

    try:
        log.info("loading `%s` ...", checkpoint)
        if message()["raw"]:
            log.info("it was trained on raw text: it goes on from a prompt")
        yield ask
    finally:
        process.terminate()
        process.communicate()


def generate(run: Run, checkpoint: Path, prompts: Sequence[Any], *, as_json: bool, **how: Any) -> None:
    """Print the responses to ``prompts`` as they come: alone, under headings where they are several, or as JSON."""
    with serving(run, checkpoint) as ask:
        for said in ask(prompts=prompts, **how):
            i, sample = said["prompt"], said["sample"]
            if as_json:
                click.echo(json.dumps({**said, "prompt": prompts[i]}, ensure_ascii=False))
                continue
            if len(prompts) * how["samples"] > 1:
                click.secho(f"== prompt {i + 1}, sample {sample + 1}", bold=True)
            click.echo(said["text"])


def lines_of(file: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of ``file``. Raises DataError for the first that is no UTF-8."""
    for number, raw in enumerate(file, 1):
        try:
            yield raw.decode()
        except UnicodeDecodeError as e:
            raise DataError(
                f"`{name}`, line {number}: not UTF-8 at byte {e.start:,} of the line", hint="save it as UTF-8"
            ) from e


def read_prompts(lines: Iterable[str], name: str) -> list[Any]:
    """The `prompt` of each line of JSONL, or its `messages`. Raises DataError that names file and line."""
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            found.append(value["prompt"] if "prompt" in value else value["messages"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(
                f"`{name}`, line {number}: no JSON object with `prompt` or `messages` ({e})",
                hint='one object a line, such as {"prompt": "Hello"}',
            ) from e
    return found


def chat(
    run: Run, checkpoint: Path, lines: Iterable[str], *, system: str | None, as_json: bool, live: bool, **how: Any
) -> None:
    """Answer line after line, each with all that was said before it.

    Args:
        live: a person is typing: answers appear as they are written, and what cannot be answered ends nothing.
    """
    begin = [{"role": "system", "content": system}] if system else []
    turns = list(begin)
    with serving(run, checkpoint) as ask:
        for number, line in enumerate(lines):
            if line == NEW:
                turns = list(begin)
                continue
            turns.append({"role": "user", "content": line})
            try:
                said = _stream(ask(prompts=[turns], stream=True, first=number, **how), show=not as_json)
            except Gone:
                raise
            except OrchError as error:
                error.hint = f"`{NEW}` begins another conversation" if len(turns) > len(begin) + 1 else error.hint
                if not live:
                    raise
                click.echo(f"{error}; {error.hint}", err=True)
                turns.pop()
                continue
            turns.append({"role": "assistant", "content": said["text"]})
            if as_json:
                answer: Mapping[str, Any] = {"user": line, "assistant": said["text"], "ended": said["ended"]}
                click.echo(json.dumps(answer, ensure_ascii=False))


def typed() -> Iterator[str]:
    """What a person types, line by line, until Ctrl-D or Ctrl-C."""
    import readline  # noqa: F401 - gives `input` its history

    piped = not sys.stdout.isatty()  # into a file, which is for answers alone
    click.echo(f"`{NEW}` begins another conversation, Ctrl-D ends", err=True)
    while True:
        try:
            if piped:
                click.echo("> ", nl=False, err=True)
            line = input("" if piped else "> ").strip()
        except (EOFError, KeyboardInterrupt):
            click.echo(err=piped)
            return
        if line:
            yield line


def _stream(messages: Iterator[dict[str, Any]], *, show: bool) -> dict[str, Any]:
    """Print an answer as it is written; return it whole."""
    shown, said = "", {}
    for said in messages:
        if "delta" in said:
            shown += said["delta"]
            if show:
                click.echo(said["delta"], nl=False)
    if show:
        click.echo(said["text"][len(shown) :])
    return said
