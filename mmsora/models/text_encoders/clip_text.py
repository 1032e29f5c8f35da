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

__all__ = ["CLIPText"]

# What a file of the whole CLIP holds besides.
NOT_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
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

    def __init__(
        self, folder: str, tokenizer: str | None = None, length: int = 77, width: int = 768
    ) -> None:
        super().__init__(length, width)
        self.folder, self.tokenizer_folder = folder, tokenizer or folder
        self.model: Any = None
        self._tokenizer: Any = None

    def init_weights(self) -> None:
        """Read weights and tokenizer.

        Raises:
            UserError: A folder is missing or cannot be read, or holds something else or another
                size.
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except (ImportError, RuntimeError, OSError) as error:
            raise UserError("CLIPText needs transformers: pip install transformers") from error
        model, info = _read(CLIPTextModel, self.folder, output_loading_info=True)
        faults = [f"missing {key}" for key in sorted(info["missing_keys"])]
        unexpected = sorted(info["unexpected_keys"])
        faults += [
            f"unknown {key}"
            for key in unexpected
            if not key.startswith(NOT_TEXT) and not key.endswith(POSITIONS)
        ]
        if faults:
            raise UserError(f"{self.folder} holds no CLIP of texts: {'; '.join(faults[:3])}")
        self._check_size(model.config)
        self._tokenizer = _read(CLIPTokenizer, self.tokenizer_folder)
        words = len(self._tokenizer)
        if words != model.config.vocab_size:
            raise UserError(
                f"the tokenizer in {self.tokenizer_folder} knows {words} tokens and the CLIP in "
                f"{self.folder} {model.config.vocab_size}: vocab.json and merges.txt, or "
                "tokenizer.json, must be those of the weights"
            )
        self.model = model.float().eval().requires_grad_(False)

    def _check_size(self, config: Any) -> None:
        if config.hidden_size != self.width:
            raise UserError(
                f"the CLIP in {self.folder} has width {config.hidden_size}, the config says "
                f"{self.width}; set model.conditioner.encoder.width"
            )
        if config.max_position_embeddings < self.length:
            raise UserError(
                f"the CLIP in {self.folder} takes {config.max_position_embeddings} tokens, the "
                f"config says {self.length}; set model.conditioner.encoder.length"
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
        made = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.model.device)
        mask = made["attention_mask"].bool()
        # CLIP was trained, and Stable Diffusion and Latte use it, without a mask of the padding.
        return self.model(made["input_ids"]).last_hidden_state.float(), mask


def _read(kind: Any, folder: str, **options: Any) -> Any:
    if not Path(folder).is_dir():
        raise UserError(
            f"there is no folder {folder}; put CLIP's weights and tokenizer there, in "
            "transformers' layout (openai/clip-vit-large-patch14 on the hub)"
        )
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers and its readers raise about anything
        reason = " ".join(str(error).split())
        raise UserError(f"no {kind.__name__} can be read from {folder}: {reason}") from error
