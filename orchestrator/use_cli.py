"""The commands of `orch` for what a run has learned: where it comes from, what it answers, how it leaves."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from orchestrator.options import AVERAGE, JSON, RUN, STEP, Finite


@click.command()
@RUN
@STEP
@click.option("--to", type=click.Path(path_type=Path), required=True, help="Folder to write, which does not exist.")
@click.pass_obj
def consolidate(root: Path, run: str, step: int | None, to: Path) -> None:
    """Write a checkpoint as one set of safetensors: whole tensors in fp32, by the model's own names.

    Weights come into `model-*.safetensors`, the optimizer's state into `optimizer-*.safetensors`. Reads
    checkpoints of every engine and layout. The folder is a checkpoint itself, which any of them goes on from.
    """
    from orchestrator import use
    from orchestrator.consolidate import checkpoint_of, size_bytes
    from orchestrator.consolidate import consolidate as write
    from orchestrator.show import bytes_bar

    folder = checkpoint_of(use.run_of(root, run), step)
    with bytes_bar(to.name, size_bytes(folder)) as wrote:
        files = write(folder, to, wrote=wrote)
    for file in files:
        click.echo(file)


def _sampling(command: Any) -> Any:
    """The options that say how a model writes."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="The same seed writes the same text."),
        click.option("--top-p", type=Finite(0, 1, min_open=True), default=1.0, show_default=True,
                     help="Draw from the likeliest that together have this probability."),
        click.option("--top-k", type=click.IntRange(0), default=0, show_default=True,
                     help="Draw from so many likeliest tokens; 0: from all."),
        click.option("--temperature", type=Finite(0), default=1.0, show_default=True,
                     help="Divides the logits; 0: always the likeliest token."),
        click.option("--max-tokens", type=click.IntRange(1), metavar="N",
                     help="Of a response. Default: 256, or what the context has room for."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@RUN
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to answer; may be given again.")
@click.option("--file", type=click.File("rb"), help="More, as JSONL: `prompt` or `messages`; `-`: stdin.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Responses to each prompt.")
@_sampling
@STEP
@AVERAGE
@JSON
@click.pass_obj
def generate(
    root: Path, run: str, prompts: Sequence[str], file: Any, step: int | None, average: bool, **how: Any
) -> None:
    """Let a trained model answer.

    What was trained on conversations answers through its template, `data.chat`; what was pretrained goes on from
    the text. With --json, each response is a line: prompt, sample, text, tokens, and whether it came to its end.

    \b
    Examples:
      orch generate demo/pretrain --prompt "def main(" --samples 3 --temperature 0.8
      orch generate chatgpt-demo/ppo --file prompts.jsonl --json > responses.jsonl
    """
    from orchestrator import use

    asked = [*prompts, *(use.read_prompts(use.lines_of(file, file.name), file.name) if file else [])]
    if not asked:
        raise click.UsageError("give `--prompt` or `--file`")
    found = use.run_of(root, run)
    use.generate(found, use.language_model(found, step, average=average), asked, **how)


@click.command()
@RUN
@click.option("--system", metavar="TEXT", help="What the conversation begins with.")
@click.option("--file", type=click.File("rb"), help="Turns of the user, one a line. Default: stdin.")
@_sampling
@STEP
@AVERAGE
@JSON
@click.pass_obj
def chat(root: Path, run: str, file: Any, step: int | None, average: bool, **how: Any) -> None:
    """Talk with a trained model, through the template of its run.

    On a terminal, answers appear as they are written. From a file or a pipe, each line is a turn, and the
    conversation is kept from one to the next.
    """
    from orchestrator import use

    live = file is None and sys.stdin.isatty()
    found = use.run_of(root, run)
    checkpoint = use.language_model(found, step, average=average)
    given, name = (file, file.name) if file else (sys.stdin.buffer, "<stdin>")
    lines = use.typed() if live else filter(None, map(str.strip, use.lines_of(given, name)))
    use.chat(found, checkpoint, lines, live=live, **how)


@click.command()
@RUN
@JSON
@click.pass_obj
def lineage(root: Path, run: str, as_json: bool) -> None:
    """Print what a run was made of, from the corpus on, with hashes.

    Of each stage: the examples it read, the checkpoints it began with, its own newest one, what it reached on
    held-out data, and its MLflow run. Says what has changed since it was read. Needs no MLflow.
    """
    from orchestrator import lineage as made_of
    from orchestrator import show, submit
    from orchestrator.run import find_runs

    found = made_of.of(find_runs(root, run), submit.state)
    if as_json:
        show.as_json(found.to_json())
    else:
        show.out().print(made_of.tree(found), soft_wrap=True)


@click.command()
@RUN
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Of weights.")
@STEP
@AVERAGE
@click.pass_obj
def export(root: Path, run: str, folder: Path, dtype: str, step: int | None, average: bool) -> None:
    """Write a trained model into FOLDER as transformers' GPT-2: weights, config, tokenizer, chat template.

    `AutoModelForCausalLM.from_pretrained` takes it, and so does a stage of kind `import_hf`. Models that GPT-2's
    layout cannot express are refused. FOLDER must not exist.
    """
    from orchestrator import use
    from orchestrator.export import export as write

    found = use.run_of(root, run)
    for file in write(found, use.language_model(found, step, average=average, hashes=True), folder, dtype=dtype):
        click.echo(file)
