"""transformers' own classes and `generate` as a back end: the same questions without our engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longverse.errors import UserError, expand
from longverse.evaluation.backends import Failure, Lane, Reply, Request, check_window
from longverse.evaluation.engine_backend import fingerprint


class TransformersBackend:
    """A model folder or hub name through transformers' own classes and `generate`, greedily, without our engine."""

    def __init__(self, path: str, *, dtype: str = "auto", device: str = "auto") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from longverse.models.checkpoint import choose_device

        place = choose_device(device)
        folder = expand(path)
        source = str(folder) if folder.exists() else path
        try:
            number = dtype if dtype == "auto" else getattr(torch, dtype)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=number)
        except AttributeError:
            raise UserError(f"Unknown dtype {dtype!r}: use auto, float32, bfloat16 or float16.") from None
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"The model {path!r} cannot be loaded by transformers ({reason}): give a model folder."
            ) from error
        self.model: Any = model.to(place).eval()
        self.name = Path(path).name or path
        self.window: int | None = getattr(model.config, "max_position_embeddings", None)
        self._weights = fingerprint(self.model)

    @property
    def lanes(self) -> Sequence[Lane]:
        return (self,)

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "backend": f"transformers {transformers.__version__}",
            "model": self.name,
            "weights": self._weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "window": self.window,
        }

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _ids(self, request: Request) -> list[int]:
        if request.prompt is not None:
            ids = self.encode(request.prompt)
        elif self.tokenizer.chat_template is None:
            raise UserError(f"{self.name} has no chat template: use the engine, which knows more formats.")
        else:
            messages = list(request.messages or ())
            how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}  # as chat.py's
            text = self.tokenizer.apply_chat_template(messages, **how)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids + self.tokenizer(request.lead, add_special_tokens=False)["input_ids"] if request.lead else ids

    def count(self, request: Request) -> int:
        return len(self._ids(request))

    def answer(self, request: Request) -> Reply:
        import torch

        ids = self._ids(request)
        check_window(self, len(ids), request.max_new_tokens, Failure)
        more: dict[str, Any] = {}
        ends = self.model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        if request.end_line:
            line_feed = self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
            more = {"eos_token_id": [*ends, line_feed], "min_new_tokens": 1}
        if request.stop:
            more |= {"stop_strings": list(request.stop), "tokenizer": self.tokenizer}
        start = time.perf_counter()
        with torch.inference_mode():
            tensor = torch.tensor([ids], device=self.model.device)  # [1, prompt tokens]
            out = self.model.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
                pad_token_id=ends[0] if ends else 0,
                **more,
            )[0, len(ids) :].tolist()
        text = self.decode(out)
        cut = [at for at in (text.find(stop) for stop in request.stop) if at >= 0]
        ended = bool(cut) or (bool(out) and out[-1] in more.get("eos_token_id", ends))
        return Reply(
            text=text[: min(cut)] if cut else text,
            prompt_tokens=len(ids),
            new_tokens=len(out),
            finish_reason="stop" if ended else "length",
            seconds=time.perf_counter() - start,
        )
