"""From a config, and perhaps a checkpoint, to a model."""

import json
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsora.models.latent_diffusion import LatentDiffusion
from mmsora.registry import MODELS
from mmsora.utils.checkpoint import WEIGHTS, load_checkpoint, load_denoiser, load_weights
from mmsora.utils.config_check import check_config, config_from_dict, user_errors
from mmsora.utils.config_names import load_config
from mmsora.utils.user_error import UserError

__all__ = ["build_model", "config_of", "fill"]

FOR_TRAINING = ("alignment.", "diffusion_state.")  # what samples are made without


def config_of(checkpoint: dict[str, Any], source: str | Path) -> Config:
    """The config that a checkpoint was trained with.

    Args:
        checkpoint: Its content.
        source: Its path, for the message.

    Returns:
        The config.

    Raises:
        UserError: It holds none.
    """
    try:
        return config_from_dict(json.loads(checkpoint["meta"]["cfg"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {source} holds no config; name one: CONFIG") from error


def build_model(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
) -> LatentDiffusion:
    """Build a model for inference.

    Args:
        config: A config, its path or its name.
        checkpoint: Weights to load, the averaged ones of the denoiser where there are any.
            Without it the denoiser is untrained.
        device: Where the model goes.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: Config or checkpoint is missing or faulty, or they do not fit each other.
    """
    cfg = config if isinstance(config, Config) else load_config(str(config))
    init_default_scope("mmsora")
    check_config(cfg)
    with user_errors():
        model = MODELS.build(cfg.model)
        model.init_weights(to_train=False)
    if checkpoint is not None:
        fill(model, load_checkpoint(checkpoint, WEIGHTS), checkpoint)
    return model.to(device).eval()


def fill(
    model: LatentDiffusion, content: dict[str, Any], source: str | Path, use_ema: bool = True
) -> None:
    """Put the weights of a checkpoint, ours or a public one, into a model.

    Args:
        model: The model.
        content: The checkpoint's content.
        source: Its path, for messages.
        use_ema: Take the averaged weights of the denoiser where there are any.

    Raises:
        UserError: The checkpoint holds no weights of such a model.
    """
    if "meta" in content and "state_dict" in content:
        state = {k: v for k, v in content["state_dict"].items() if not k.startswith(FOR_TRAINING)}
        own = {k: v for k, v in model.state_dict().items() if k.startswith(FOR_TRAINING)}
        load_weights(model, {**state, **own}, source)
        if use_ema and "ema" in content:
            load_weights(model.denoiser, content["ema"], source)
        return
    if not use_ema:
        if set(content) <= {"meta", "ema"}:
            raise UserError(f"checkpoint {source} holds averaged weights alone, no raw ones")
        content = {key: value for key, value in content.items() if key != "ema"}
    kept = load_denoiser(model.denoiser, content, f"checkpoint {source}").kept
    if "embed_label.weight" in kept:
        raise UserError(
            f"checkpoint {source} has no labels for num_classes={model.denoiser.num_classes}; "
            "set model.denoiser.num_classes and model.conditioner.num_classes to its number"
        )
    if "embed_text.weight" in kept:
        raise UserError(
            f"checkpoint {source} has no text projection for text={model.denoiser.text}; set "
            "model.denoiser.text to its encoder's length and width"
        )
