"""Diffusers' schedulers as solvers."""

import inspect
from typing import Any

import torch
from torch import Tensor

from mmsora.diffusion.level import RandomNumbers
from mmsora.diffusion.path import Path
from mmsora.diffusion.prediction import (
    EDMPrediction,
    NoisePrediction,
    Prediction,
    VelocityPrediction,
    VPrediction,
)
from mmsora.diffusion.solver import Denoise, Solver
from mmsora.registry import SCHEDULERS
from mmsora.utils.config_calls import suggestion

__all__ = ["DiffusersSolver"]

ON_A_TABLE = (
    "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
    "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete",
    "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
    "UniPCMultistep",
)  # fmt: skip
ON_A_LINE = (
    "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete", "FlowMatchLCM", "SASolver", "UniPCMultistep",
)  # fmt: skip
EXPLODING = ("EDMDPMSolverMultistep", "EDMEuler")


@SCHEDULERS.register_module()
class DiffusersSolver(Solver):
    """A scheduler of diffusers.

    It is told our levels and given the network's estimate in the form it asks for, whatever the
    network predicts; a learned variance is not used. The grid says how many steps there are. The
    scheduler says where, by its own options (``timestep_spacing``, ``use_karras_sigmas`` and the
    like); only those that take ``sigmas`` on a linear path get the grid's.

    * On a table, DiscretePath: DDIM, DDIMParallel, DDPM, DDPMParallel, DPMSolverMultistep,
      EulerAncestralDiscrete, EulerDiscrete, LCM, TCD, UniPCMultistep; and where its last level is
      not pure noise, DEISMultistep, DPMSolverSinglestep, HeunDiscrete, KDPM2AncestralDiscrete,
      KDPM2Discrete, LMSDiscrete, PNDM, SASolver.
    * On LinearPath, shifted or not: FlowMatchEulerDiscrete, FlowMatchHeunDiscrete, FlowMatchLCM,
      DEISMultistep, DPMSolverMultistep, DPMSolverSinglestep, SASolver, UniPCMultistep.
    * On VEPath: EDMDPMSolverMultistep, EDMEuler.

    Args:
        scheduler: Name of its class in diffusers, as ``DPMSolverMultistepScheduler``.
        options: Arguments of the class, on top of those that the path decides.
        step_options: Arguments of its ``step``, as ``dict(eta=1.0)`` of DDIM.
    """

    def __init__(
        self, scheduler: str, options: dict | None = None, step_options: dict | None = None
    ) -> None:
        self.name = scheduler.removesuffix("Scheduler")
        self.scheduler_class = _scheduler_class(self.name)
        self.options, self.step_options = dict(options or {}), dict(step_options or {})
        for argument, given, function in (
            ("options", self.options, self.scheduler_class.__init__),
            ("step_options", self.step_options, self.scheduler_class.step),
        ):
            known = _parameters(function)
            for key in given:
                if key not in known:
                    raise ValueError(
                        f"{argument}: {scheduler} takes no {key!r}{suggestion(key, known)}"
                    )

    def __call__(
        self, denoise: Denoise, x: Tensor, path: Path, times: Tensor, draws: RandomNumbers
    ) -> Tensor:
        scheduler, form = self._prepared(path, times)
        options = dict(self.step_options)
        if "generator" in _parameters(scheduler.step):
            options["generator"] = _generators(draws)
        scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
        table = path.num_levels is not None
        sample = x
        if table:  # some count in sigma / alpha: to them a sample is divided by alpha
            sample = x / scale(torch.ones(()), scheduler.timesteps[0])
        for i, t in enumerate(scheduler.timesteps):
            level = path.at(t if table else scheduler.sigmas[i], x)
            scaled = scale(sample, t)  # on a table to our x; EDM's is for a network alone
            estimate = denoise(scaled if table else sample, level)
            output = form.target(path, estimate.x0, estimate.noise, level)
            sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]
        return sample.to(x)

    def _prepared(self, path: Path, times: Tensor) -> tuple[Any, Prediction]:
        """The scheduler at the start of its way, and the form in which it wants estimates."""
        known = _parameters(self.scheduler_class.__init__)
        decided: dict[str, Any] = {}
        form: Prediction = VelocityPrediction()
        if path.num_levels is not None and self.name in ON_A_TABLE:
            decided, form = _of_table(path)
        elif _is_linear(path) and self.name in ON_A_LINE:
            decided = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        elif _is_exploding(path) and self.name in EXPLODING:
            least = path.time_at(torch.zeros((), dtype=torch.float64)).item()
            decided = {"sigma_min": least, "sigma_max": path.t_noise}
            form = EDMPrediction(self.options.get("sigma_data", 0.5))
        else:
            raise ValueError(
                f"diffusers' {self.name} does not run on {type(path).__name__}; the documentation "
                "of DiffusersSolver says which does"
            )
        if decided.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
            raise ValueError(
                f"diffusers' {self.name} cannot start in pure noise; use zero_terminal_snr=False "
                "or another scheduler, as DDIM"
            )
        decided = {"lower_order_final": True, **decided}
        decided = {key: value for key, value in decided.items() if key in known}
        scheduler: Any = self.scheduler_class(**{**decided, **self.options})
        if _is_linear(path) and "sigmas" in _parameters(scheduler.set_timesteps):
            scheduler.set_timesteps(sigmas=times[:-1].numpy())
        else:
            scheduler.set_timesteps(len(times) - 1)
        return scheduler, form


def _scheduler_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("DiffusersSolver needs diffusers: pip install diffusers") from error
    names = {*ON_A_TABLE, *ON_A_LINE, *EXPLODING}
    if name not in names:
        raise ValueError(f"unknown scheduler {name!r}{suggestion(name, names)}")
    return getattr(diffusers, f"{name}Scheduler")


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _of_table(path: Path) -> tuple[dict[str, Any], Prediction]:
    """What a scheduler is told of a table, and the form in which estimates are sound on it."""
    levels = torch.arange(-1, path.num_levels or 0, dtype=torch.float64)
    alpha, _ = path.coefficients(levels)
    pure = bool(alpha[-1] == 0)
    decided = {
        "num_train_timesteps": path.num_levels,
        "trained_betas": (1 - (alpha[1:] / alpha[:-1]) ** 2).tolist(),
        "prediction_type": "v_prediction" if pure else "epsilon",
        "rescale_betas_zero_snr": pure,
        "clip_sample": False,  # latents have no range
        "set_alpha_to_one": True,
    }
    return decided, VPrediction() if pure else NoisePrediction()


def _is_linear(path: Path) -> bool:
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    alpha, sigma = path.coefficients(t)
    return path.num_levels is None and torch.equal(sigma, t) and torch.equal(alpha, 1 - t)


def _is_exploding(path: Path) -> bool:
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    alpha, sigma = path.coefficients(t)
    return path.num_levels is None and torch.equal(sigma, t) and bool((alpha == 1).all())


def _generators(draws: RandomNumbers) -> list[torch.Generator]:
    """One for each sample, so that its noise is the same alone and in a batch."""
    numbers = draws.uniform("solver/generators").tolist()
    return [torch.Generator().manual_seed(int(number * 2**53)) for number in numbers]
