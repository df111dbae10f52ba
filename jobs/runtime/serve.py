"""`python -m jobs.runtime.serve RUN_FOLDER CHECKPOINT_FOLDER`: a trained model that answers, JSON lines both ways.

    in   {"prompts": ["text", [{"role": ..., "content": ...}, ...]], "samples": 1, "max_tokens": null, ...}
    out  {"ready": "the weights of ..."}         once
         {"delta": "some text"}                  as it is drawn, where the request says `"stream": true`
         {"prompt": 0, "sample": 0, "text": "some text", "tokens": 3, "ended": true}    one a response
         {"done": true}, or {"error": ..., "hint": ...}                                 one a request

What is drawn depends on seed, prompt and number of the sample alone: not on batches, nor on what was asked before.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.data.chat import Chat, as_text, require_rows, turns_of
from jobs.runtime.hf import identified, tokenizer_of
from jobs.runtime.pieces import Piece, Store
from orchestrator.errors import DataError, OrchError
from orchestrator.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.nn.gpt import GPT

RAW = ("pretrain", "import_hf")  # kinds that know text, and no template
ROWS = 16  # responses sampled at once
MAX_TOKENS = 256  # of a response, where nothing else is said and the context has room
Say = Callable[..., None]


def main(run_folder: str, folder: str) -> None:
    """Load, then answer until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        run = Run.load(Path(run_folder))
        model, chat = load(run, Path(folder))
        raw = run.spec().stages[run.stage].kind in RAW
        say(ready=f"`{folder}`", raw=raw)
    except Exception as e:  # noqa: BLE001 - whoever waits is told
        say(**refusal(e))
        return
    for line in sys.stdin:
        try:
            answer(model, chat, json.loads(line), say, raw=raw)
            say(done=True)
        except Exception as e:  # noqa: BLE001 - whoever asked is told, and may ask for something else
            say(**refusal(e))


def refusal(error: Exception) -> dict[str, str]:
    """What is said of ``error``; a GPU without room raises a RuntimeError. Of a defect stderr has the traceback."""
    if isinstance(error, OrchError):
        return {"error": str(error), "hint": error.hint}
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    if isinstance(error, RuntimeError | MemoryError):
        return {"error": said, "hint": "for want of memory? ask for fewer samples or tokens, or where there is more"}
    traceback.print_exception(error)
    return {"error": said, "hint": "this is a defect, please report it: the traceback stands above"}


def load(run: Run, folder: Path) -> tuple[GPT, Chat]:
    """The model of the checkpoint in ``folder``, on a GPU if there is one, and the tokenizer it was trained with.

    Raises:
        CheckpointError: it is of another model or tokenizer, or has no weights for some parameter.
        DataError: the tokenizer is gone, or has tokens that the model does not know.
    """
    import torch

    from jobs.nn.gpt import GPT

    experiment = run.spec()
    chat = identified(folder, experiment)
    require_rows(chat.tokenizer, tokenizer_of(experiment.data), experiment.model.vocab)
    with torch.device("meta"):
        model = GPT(experiment.model)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu").eval()
    with Store(folder) as store:
        for name, p in model.named_parameters():
            store.fill(Piece(name=name, slot="weight", shape=tuple(p.shape), data=p.detach().view(-1)))
    return model, chat


def answer(model: GPT, chat: Chat, request: Mapping[str, Any], say: Say, *, raw: bool) -> None:
    """Say ``samples`` responses to each prompt, as they are done."""
    from jobs.nn.rollout import Sampling, generate

    prompts = [tokens_of(prompt, chat, raw=raw) for prompt in request["prompts"]]
    room = _room(prompts, model.spec.seq_len, request.get("max_tokens"))
    how = {key: request[key] for key in ("temperature", "top_k", "top_p") if key in request}
    sampling, samples = Sampling(max_tokens=room, **how), request.get("samples", 1)
    rows = [(i, k) for i in range(len(prompts)) for k in range(samples)]
    for first in range(0, len(rows), ROWS):
        batch = rows[first : first + ROWS]
        stream = Stream(chat, say) if request.get("stream") else None
        rollout = generate(
            model,
            [prompts[i] for i, _ in batch],
            sampling,
            end=chat.end,
            seed=request.get("seed", 0),
            first=request.get("first", 0) + first,
            watch=stream,
        )
        for (i, k), ids in zip(batch, rollout.responses(), strict=True):
            ended = bool(ids) and ids[-1] == chat.end
            say(prompt=i, sample=k, text=chat.text(ids), tokens=len(ids), ended=ended)


def tokens_of(prompt: str | list[dict[str, str]], chat: Chat, *, raw: bool) -> list[int]:
    """Tokens of a prompt: a text to go on from as it is where the model is ``raw``, else through the template.

    Raises DataError where it is neither a text nor a list of turns.
    """
    try:
        if raw and isinstance(prompt, str):
            ids: list[int] = chat.tokenizer.encode(as_text(prompt), add_special_tokens=False).ids
            return ids or [chat.end]  # which stands before each text
        return chat.prompt(turns_of(prompt)) or [chat.end]
    except ValueError as e:
        raise DataError(f"prompt {prompt!r}: {e}", hint="such as `[{'role': 'user', 'content': 'Hello'}]`") from None


def _room(prompts: Sequence[Sequence[int]], seq_len: int, asked: int | None) -> int:
    """How many tokens a response may have: as ``asked``, else what is left behind the longest prompt."""
    longest = max(map(len, prompts))
    left = seq_len + 1 - longest  # nothing reads the last token
    if left < 1 or (asked or 0) > left:
        wanted = f" and a response of up to {asked}" if asked else ""
        raise DataError(
            f"a prompt of {longest} tokens{wanted} does not fit the model's context of {seq_len}",
            hint=f"ask for at most {left} tokens" if left > 0 else f"cut the prompt to {seq_len} tokens or fewer",
        )
    return asked or min(MAX_TOKENS, left)


class Stream:
    """Says what one response has become, as soon as its bytes are whole characters and surely of the answer."""

    def __init__(self, chat: Chat, say: Say) -> None:
        self.chat, self.say = chat, say
        self.ids: list[int] = []
        self.shown = 0

    def __call__(self, tokens_B: Tensor) -> None:
        """Take the next token of the one row there is."""
        self.ids.append(int(tokens_B[0]))
        text, behind = self.chat.text(self.ids), self.chat.behind_answers
        held = next((k for k in range(len(behind), 0, -1) if text.endswith(behind[:k])), 0)  # it may yet be the end
        if len(text) - held > self.shown and not text.endswith("\ufffd"):
            self.say(delta=text[self.shown : len(text) - held])
            self.shown = len(text) - held


if __name__ == "__main__":
    main(*sys.argv[1:])
