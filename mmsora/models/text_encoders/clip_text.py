"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020) as transformers has it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsora.models.text_encoders.text_encoder import TextEncoder
from mmsora.registry import TEXT_ENCODERS
from mmsora.utils.feature_store import checksum
from mmsora.utils.user_error import UserError

__all__ = ["CLIPText", "CLIPTextPooled", "read_clip"]

POSITIONS = "position_ids"  # older files hold them


@TEXT_ENCODERS.register_module()
class CLIPText(TextEncoder):
    """The states after the last norm, of texts that are cut or padded to 77 tokens.

    The defaults are those of CLIP ViT-L/14, which Stable Diffusion 1 and Latte use.

    Args:
        folder: Of the weights, in transformers' layout. Nothing is downloaded.
        tokenizer: Folder of the tokenizer; None is the weights'.
        length: Tokens of a text, the start and the end included.
        width: Width of the states.
    """

    kind = "CLIPTextModel"
    # What a file of the whole CLIP holds besides.
    besides: tuple[str, ...] = (
        "vision_model.",
        "visual_projection.",
        "text_projection.",
        "logit_scale",
    )

    def __init__(
        self, folder: str, tokenizer: str | None = None, length: int = 77, width: int = 768
    ) -> None:
        super().__init__(length, width)
        self.folder, self.tokenizer_folder = folder, tokenizer or folder
        self.model: Any = None
        self._tokenizer: Any = None

    @property
    def num_tokens(self) -> int:
        """Tokens of a text."""
        return self.length

    def init_weights(self) -> None:
        """Read weights and tokenizer.

        Raises:
            UserError: A folder is missing or cannot be read, or holds something else or another
                size.
        """
        model = read_clip(self.kind, self.folder, "texts", self.besides)
        self._check_size(model.config)
        self._tokenizer = _read("CLIPTokenizer", self.tokenizer_folder)
        words = len(self._tokenizer)
        if words != model.config.vocab_size:
            raise UserError(
                f"the tokenizer in {self.tokenizer_folder} knows {words} tokens and the CLIP in "
                f"{self.folder} {model.config.vocab_size}: vocab.json and merges.txt, or "
                "tokenizer.json, must be those of the weights"
            )
        self.model = model

    def _check_size(self, config: Any) -> None:
        if config.hidden_size != self.width:
            raise UserError(
                f"the CLIP in {self.folder} has width {config.hidden_size}, the config says "
                f"{self.width}; set model.conditioner.encoder.width"
            )
        if config.max_position_embeddings < self.num_tokens:
            raise UserError(
                f"the CLIP in {self.folder} takes {config.max_position_embeddings} tokens, the "
                f"config says {self.num_tokens}; set model.conditioner.encoder.length"
            )

    def identity(self) -> dict[str, Any]:
        """The sizes, and the folders of weights and tokenizer."""
        folders = list(dict.fromkeys([self.folder, self.tokenizer_folder]))
        return {**super().identity(), "source": ", ".join(folders)}

    def fingerprint(self) -> str:
        """A hash of the weights and of the tokenizer's words."""
        words = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        weights = {  # of one name in all versions of transformers
            key.removeprefix("text_model."): value
            for key, value in self.model.state_dict().items()
            if not key.endswith(POSITIONS)
        }
        return checksum(
            {**weights, "tokenizer": torch.tensor(list(words.encode()), dtype=torch.uint8)}
        )

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens, mask = self._tokens(texts)
        # CLIP was trained, and Stable Diffusion and Latte use it, without a mask of the padding.
        return self.model(tokens).last_hidden_state.float(), mask.bool()

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Their numbers and whether they are the text's own, each (B, num_tokens)."""
        made = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.num_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        return made["input_ids"], made["attention_mask"]


@TEXT_ENCODERS.register_module()
class CLIPTextPooled(CLIPText):
    """The states before the last norm and, in the last place, the projected one of the whole text.

    The defaults are those of CLIP ViT-bigG/14, which StableCascade uses: 77 tokens, and the
    embedding behind them. Padding is masked, as there.

    Args:
        folder: Of the weights, in transformers' layout. Nothing is downloaded.
        tokenizer: Folder of the tokenizer; None is the weights'.
        length: Tokens of a text, the start and the end included, and one.
        width: Width of the states, and of the embedding.
    """

    kind = "CLIPTextModelWithProjection"
    besides = ("vision_model.", "visual_projection.", "logit_scale")

    def __init__(
        self, folder: str, tokenizer: str | None = None, length: int = 78, width: int = 1280
    ) -> None:
        super().__init__(folder, tokenizer, length, width)

    @property
    def num_tokens(self) -> int:
        """Tokens of a text."""
        return self.length - 1

    def _check_size(self, config: Any) -> None:
        super()._check_size(config)
        if config.projection_dim != self.width:
            raise UserError(
                f"the CLIP in {self.folder} projects texts to {config.projection_dim} channels "
                f"and its states have {self.width}; CLIPTextPooled needs as many"
            )

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens, mask = self._tokens(texts)
        made = self.model(tokens, attention_mask=mask, output_hidden_states=True)
        states = torch.cat([made.hidden_states[-1], made.text_embeds[:, None]], dim=1)
        return states.float(), torch.cat([mask, mask[:, :1]], dim=1).bool()


def read_clip(kind: str, folder: str, of: str, besides: tuple[str, ...]) -> Any:
    """A part of CLIP, frozen and in float32.

    Args:
        kind: Name of its class in transformers.
        folder: Of the weights. Nothing is downloaded.
        of: What it is of, for messages.
        besides: How keys start that a file of the whole CLIP holds besides.

    Returns:
        The model.

    Raises:
        UserError: The folder is missing or cannot be read, or holds something else.
    """
    model, info = _read(kind, folder, output_loading_info=True)
    faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
    faults += [
        f"unknown {key}"
        for key in sorted(info["unexpected_keys"])
        if not key.startswith(besides) and not key.endswith(POSITIONS)
    ]
    if faults:
        raise UserError(f"{folder} holds no CLIP of {of}: {'; '.join(faults[:3])}")
    return model.float().eval().requires_grad_(False)


def _read(kind: str, folder: str, **options: Any) -> Any:
    try:
        import transformers

        found = getattr(transformers, kind)
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"{kind} needs transformers: pip install transformers") from error
    if not Path(folder).is_dir():
        raise UserError(
            f"there is no folder {folder}; put CLIP's weights and tokenizer there, in "
            "transformers' layout (openai/clip-vit-large-patch14 on the hub)"
        )
    try:
        return found.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers and its readers raise about anything
        reason = " ".join(str(error).split())
        raise UserError(f"no {kind} can be read from {folder}: {reason}") from error
