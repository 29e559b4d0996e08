"""XVERSE behind transformers' classes: the modules of network.py with caches, masks, losses and `generate`.

Shapes: B batch, T new tokens, S all tokens in the cache after them, V vocabulary.

What differs from transformers' Llama class is dynamic NTK. There the base follows the largest position of each forward
while cached keys keep the base they were rotated with. Here it follows the *planned* length: `generate` knows it
(prompt + max_new_tokens, per row, padding not counted), pins it before the first chunk, and keeps it on the cache.
"""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import UserError
from .configuration_xverse import XverseConfig
from .network import Decoder
from .rope import RopePlan


class XverseForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model for AutoModelForCausalLM, PEFT, `generate` and transformers' quantisers."""

    config: XverseConfig
    config_class = XverseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers' own class attributes
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: XverseConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config.to_network())
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # ---- RoPE -------------------------------------------------------------------------------------------

    @property
    def rope_plan(self) -> RopePlan:
        """The plan the live model computes its angles from."""
        return self.model.rotary.plan

    def set_rope(self, plan: RopePlan) -> None:
        """Change the plan of the live model and of its config together. A plan for another head size, or one that
        turns every position as the plan in force does, is an error: the step would look done and be none."""
        current = self.rope_plan
        if plan.head_dim != current.head_dim:
            raise UserError(
                f"The plan is for heads of {plan.head_dim} and this model's have {current.head_dim}: make it anew."
            )
        if plan.same_angles(current, self.config.max_position_embeddings):
            raise UserError(f"The model already runs {current.describe()}: this change changes nothing.")
        self.model.rotary.plan = plan
        self.config.set_plan(plan)

    def _rope_length(self, given: int | Tensor | None, past: Cache | None, positions: Tensor) -> int | Tensor:
        """The planned length for this forward: what the caller gave, else what the cache was begun with, else (no
        past) each row's own length. Only dynamic NTK depends on it."""
        if self.rope_plan.kind != "dynamic":
            return 1
        pinned = getattr(past, "rope_length", None)
        if given is None and pinned is None:
            if past is not None and past.get_seq_length() > 0:
                raise UserError(
                    "This cache was begun without a planned length, so its RoPE base is unknown: pass rope_length to"
                    " the first forward."
                )
            given = positions.max(dim=-1, keepdim=True).values + 1  # [B or 1, 1]
        if given is None:
            given = pinned
        elif pinned is not None and not torch.equal(torch.as_tensor(given), torch.as_tensor(pinned)):
            raise UserError(f"rope_length {given} differs from {pinned}, which this cache was begun with.")
        assert given is not None
        longest = positions.max(dim=-1, keepdim=True).values + 1
        if bool((longest > torch.as_tensor(given, device=longest.device)).any()):
            raise UserError(
                f"Position {int(longest.max()):,} lies past the planned length {given} that the RoPE base was chosen"
                " for: begin a new cache with a larger rope_length."
            )
        if past is not None:
            past.rope_length = given  # type: ignore[attr-defined]
        return given

    # ---- forward ----------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        rope_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' Llama class, and `rope_length`: the planned total length in tokens, an int or int64 [B, 1]
        or [B, T]; needed for dynamic NTK when a cache is filled by hand in several forwards.

        input_ids int64 [B, T]; attention_mask [B, S] (0 is padding) or [B, 1, T, S]; returns logits [B, T, V].
        Attention weights and hidden states of single layers are not returned.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, C]
        tokens = x.shape[1]
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past_length, past_length + tokens, device=x.device)[None]  # [1, T]
        mask: Any = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )  # bool [B, 1, T, S], or None where plain causal attention is meant
        rope_length = self._rope_length(rope_length, past_key_values, position_ids)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, layer)  # [B, G, S, D]
            causal = mask is None and q.shape[2] > 1
            gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)

        hidden = self.model(x, position_ids, rope_length, attend)  # [B, T, C]
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:]
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    # ---- generate ---------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """transformers calls this once per `generate`, when the total length is settled and before the first forward:
        the moment to pin the RoPE base."""
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        past = model_kwargs.get("past_key_values")
        if self.rope_plan.kind != "dynamic" or model_kwargs.get("rope_length") is not None:
            return result
        if getattr(generation_mode, "value", "") == "assisted_generation":
            raise UserError(
                "Assisted decoding reads past the planned length that dynamic NTK's base was chosen for: pass a larger"
                " rope_length, or leave assistance off."
            )
        pinned = getattr(past, "rope_length", None)
        if pinned is not None:
            model_kwargs["rope_length"] = pinned
            return result
        total = max_cache_length + 1  # prompt and new tokens, padding included
        mask: Any = model_kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2
        model_kwargs["rope_length"] = total - (mask == 0).sum(-1, keepdim=True) if padded else total
        return result

    # ---- chat and quantize, as on the original site -----------------------------------------------------

    def chat(
        self,
        tokenizer: Any,
        history: list[dict[str, str]],
        stream: bool = False,
        generation_config: Any = None,
        **settings: Any,
    ) -> str | Iterator[str]:
        """Answer the last message of a conversation; needs longverse installed.

        tokenizer           transformers' fast tokenizer of this checkpoint
        history             messages with role (system, user, assistant, exec) and content; the model's chat template,
                            or XVERSE's own `Human: ... Assistant: ` format
        stream              yield the answer in pieces instead of returning it
        generation_config   and further keywords go to `generate`; without a length, 2,048 new tokens at most
        """
        from transformers import TextIteratorStreamer

        try:
            from longverse.models.chat import ChatFormat, cut_at_stop, may_stop
            from longverse.models.tokenizer import Tokenizer
        except ImportError:
            raise UserError("chat() needs the longverse package: install it, or use generate().") from None

        ends = self.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
        backend = Tokenizer(
            tokenizer.backend_tokenizer,
            bos_id=tokenizer.bos_token_id,
            eos_ids=ends,
            chat_template=tokenizer.chat_template,
        )
        form = ChatFormat.for_model(backend, {"model_type": "xverse"}, "xverse")
        ids = torch.tensor([form.encode(history)], device=self.device)  # [1, T]
        if generation_config is None and not {"max_new_tokens", "max_length"} & settings.keys():
            settings["max_new_tokens"] = 2048
        if form.stop_strings:
            settings |= {"stop_strings": list(form.stop_strings), "tokenizer": tokenizer}
        settings.setdefault("eos_token_id", ends)
        settings.setdefault("pad_token_id", ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        settings |= {"attention_mask": torch.ones_like(ids), "generation_config": generation_config}
        if not stream:
            answer = self.generate(ids, **settings)[0, ids.shape[1] :]  # type: ignore[misc]
            return cut_at_stop(tokenizer.decode(answer, skip_special_tokens=True), form.stop_strings)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

        def pieces() -> Iterator[str]:
            failures: list[BaseException] = []

            def write() -> None:
                try:
                    self.generate(ids, streamer=streamer, **settings)  # type: ignore[misc]
                except BaseException as error:  # carried to the reader, who waits on the other thread
                    failures.append(error)
                    streamer.end()

            writer = Thread(target=write, daemon=True)
            writer.start()
            given, text = 0, ""
            for piece in streamer:
                text += piece
                ready = len(cut_at_stop(text, form.stop_strings)) - may_stop(text, form.stop_strings)
                if ready > given:
                    yield text[given:ready]
                    given = ready
            writer.join()
            if rest := cut_at_stop(text, form.stop_strings)[given:]:
                yield rest
            if failures:
                raise failures[0]

        return pieces()

    def quantize(self, bits: int) -> "XverseForCausalLM":
        """Quantise the linear layers of the live model, the head left alone: 8 bits with one scale a row, or 4 bits in
        groups of 64; needs longverse installed. Returns the model itself."""
        try:
            from longverse.models.quant_linear import quantize_network
        except ImportError:
            raise UserError("quantize() needs the longverse package: install it.") from None

        if bits not in (4, 8):
            raise UserError(f"{bits} bits are not among the quantised forms: use 8 or 4.")
        left = quantize_network(self, bits)
        if left:
            raise UserError(
                f"{len(left)} layers, {left[0]} among them, do not divide into groups of 64, so nothing was changed:"
                " use 8 bits."
            )
        return self
