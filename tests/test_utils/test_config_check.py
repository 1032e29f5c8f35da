"""Mistakes in a config are found before anything is built, in either dialect."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmsora.registry import DENOISERS, MODELS
from mmsora.utils.config_check import (
    apply_choice,
    apply_overrides,
    check_config,
    config_dict,
    config_diff,
    config_from_dict,
    user_errors,
)
from mmsora.utils.config_names import config_names, load_config
from mmsora.utils.user_error import UserError

TEXT = """
model = dict(
    type='LatentDiffusion',
    data_preprocessor=dict(type='VideoPreprocessor'),
    vae=dict(type='IdentityVAE'),
    conditioner=dict(type='LabelConditioner', num_classes=3),
    denoiser=dict(type='Latte', in_channels=1, out_channels=1, size=(2, 4, 4), patch=2, width=16,
                  depth=2, heads=2, num_classes=3),
    diffusion=dict(
        type='Diffusion',
        path=dict(type='LinearPath'),
        prediction=dict(type='VelocityPrediction'),
        train_times=dict(type='LogitNormalTimes'),
        solver=dict(type='Euler', eta=0.5),
        grid=dict(type='SpacedGrid', num_steps=2),
        guidance=dict(type='ClassifierFree', scale=2.0),
        loss=dict(type='MSE'),
    ),
)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(type='MovingDigits', length=4),
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='pseudo_collate'),
)
train_cfg = dict(by_epoch=False, max_iters=2)
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.99)),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=1),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=1, convert_to_iter_based=True),
]
default_hooks = dict(
    timer=None,
    logger=dict(type='LoggerHook', interval=1, priority='LOW'),
)
custom_hooks = [dict(type='DenoiserEMAHook', decay=0.9)]
visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
env_cfg = dict(mp_cfg=dict(opencv_num_threads=0), dist_cfg=dict(backend='gloo'))
default_scope = 'mmsora'
num_classes, helper = 3, dict(anything=dict(type='goes'))
"""

PURE = """
import torch
from mmengine.dataset import InfiniteSampler
from torch import optim

from mmsora.datasets import MovingDigits
from mmsora.models import Latte

model = dict(denoiser=dict(type=Latte), dtype=torch.bfloat16)
train_dataloader = dict(
    dataset=dict(type=MovingDigits, length=4), sampler=dict(type=InfiniteSampler)
)
optim_wrapper = dict(optimizer=dict(type=optim.AdamW, betas=(0.9, 0.99)))
"""


@pytest.fixture
def read(tmp_path):
    def load(text):
        path = tmp_path / "config.py"
        path.write_text(text)
        return load_config(path)

    return load


def message(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_are_right(name):
    check_config(load_config(name))


def test_a_config_of_strings_is_right(read):
    check_config(read(TEXT))


MISTAKES = {
    "top level": (
        "train_cgf = dict(max_iters=20)",
        "train_cgf = {'max_iters': 20}: unknown key; did you mean 'train_cfg'?",
    ),
    "argument of a class": (
        "model['denoiser']['detph'] = 8",
        "model.denoiser.detph = 8: Latte takes no 'detph'; did you mean 'depth'?",
    ),
    "nothing like it": (
        "model['diffusion']['grid']['zzz'] = 8",
        "model.diffusion.grid.zzz = 8: SpacedGrid takes no 'zzz'; there is last_step, num_steps, "
        "spacing, span",
    ),
    "no arguments at all": (
        "model['diffusion']['prediction'] = dict(type='VPrediction', scale=2)",
        "model.diffusion.prediction.scale = 2: VPrediction takes no 'scale'",
    ),
    "missing argument": (
        "del model['denoiser']['width']",
        "model.denoiser (Latte): missing 'width'",
    ),
    "missing type": ("del model['denoiser']['type']", "model.denoiser: missing 'type'"),
    "name": (
        "model['denoiser']['type'] = 'Late'",
        "model.denoiser: unknown DENOISERS name 'Late'; did you mean 'Latte'?",
    ),
    "name of another registry": (
        "model['denoiser']['type'] = 'Euler'",
        "model.denoiser: unknown DENOISERS name 'Euler'; it is one of SCHEDULERS",
    ),
    "dotted name": (
        "model['denoiser']['type'] = 'mmsora.models.Lattte'",
        "model.denoiser: mmsora.models has no 'Lattte'; did you mean 'Latte'?",
    ),
    "dotted module": (
        "model['denoiser']['type'] = 'nowhere.Latte'",
        "model.denoiser: cannot import 'nowhere.Latte': No module named 'nowhere'",
    ),
    "type of no kind": (
        "model['vae']['type'] = 3",
        "model.vae.type = 3: neither a class nor the name of one",
    ),
    "name of MMEngine's": (
        "custom_hooks.append(dict(type='EMAHok'))",
        "custom_hooks.1: unknown HOOKS name 'EMAHok'; did you mean 'EMAHook'?",
    ),
    "runner": (
        "runner_type = 'SoraRuner'",
        "runner_type: unknown RUNNERS name 'SoraRuner'; did you mean 'SoraRunner'?",
    ),
    "data loader": (
        "train_dataloader['batchsize'] = 4",
        "train_dataloader.batchsize = 4: train_dataloader takes no 'batchsize'; did you mean "
        "'batch_size'?",
    ),
    "data loader without sampler": (
        "del train_dataloader['sampler']",
        "train_dataloader: missing 'sampler'",
    ),
    "data set": (
        "train_dataloader['dataset']['lenght'] = 4",
        "train_dataloader.dataset.lenght = 4: MovingDigits takes no 'lenght'; did you mean "
        "'length'?",
    ),
    "sampler": (
        "train_dataloader['sampler']['shufle'] = True",
        "train_dataloader.sampler.shufle = True: InfiniteSampler takes no 'shufle'; did you mean "
        "'shuffle'?",
    ),
    "loop": (
        "train_cfg['max_iter'] = 3",
        "train_cfg.max_iter = 3: train_cfg takes no 'max_iter'; did you mean 'max_iters'?",
    ),
    "kind of loop": ("del train_cfg['by_epoch']", "train_cfg: missing 'by_epoch'"),
    "epochs in a loop of iterations": (
        "train_cfg = dict(by_epoch=True, max_iters=3)",
        "train_cfg.max_iters = 3: train_cfg takes no 'max_iters'; did you mean 'max_epochs'?",
    ),
    "optimizer": (
        "optim_wrapper['optimizer']['weigth_decay'] = 0",
        "optim_wrapper.optimizer.weigth_decay = 0: AdamW takes no 'weigth_decay'; did you mean "
        "'weight_decay'?",
    ),
    "optimizer wrapper": (
        "optim_wrapper['precison'] = 'bf16'",
        "optim_wrapper.precison = 'bf16': AutocastOptimWrapper takes no 'precison'; did you mean "
        "'precision'?",
    ),
    "clipping by norm": (
        "optim_wrapper['clip_grad'] = dict(max_nrom=1)",
        "optim_wrapper.clip_grad.max_nrom = 1: clip_grad takes no 'max_nrom'; did you mean "
        "'max_norm'?",
    ),
    "clipping by value": (
        "optim_wrapper['clip_grad'] = dict(type='value', max_norm=1)",
        "optim_wrapper.clip_grad.max_norm = 1: clip_grad takes no 'max_norm'; there is "
        "clip_value, foreach",
    ),
    "schedule": (
        "param_scheduler[0]['start_facto'] = 0",
        "param_scheduler.0.start_facto = 0: LinearLR takes no 'start_facto'; did you mean "
        "'start_factor'?",
    ),
    "default hook": (
        "default_hooks['logger']['intervall'] = 5",
        "default_hooks.logger.intervall = 5: LoggerHook takes no 'intervall'; did you mean "
        "'interval'?",
    ),
    "default hook without type": (
        "default_hooks['loger'] = dict(interval=5)",
        "default_hooks.loger: missing 'type'",
    ),
    "visualizer": (
        "visualizer['backends'] = []",
        "visualizer.backends = []: visualizer takes no 'backends'; did you mean 'vis_backends'?",
    ),
    "randomness": (
        "randomness['sed'] = 1",
        "randomness.sed = 1: randomness takes no 'sed'; did you mean 'seed'?",
    ),
    "environment": (
        "env_cfg['cudnn_bench'] = True",
        "env_cfg.cudnn_bench = True: env_cfg takes no 'cudnn_bench'; did you mean "
        "'cudnn_benchmark'?",
    ),
    "processes": (
        "env_cfg['mp_cfg']['start_method'] = 'fork'",
        "env_cfg.mp_cfg.start_method = 'fork': mp_cfg takes no 'start_method'; did you mean "
        "'mp_start_method'?",
    ),
}


@pytest.mark.parametrize(("line", "text"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_name_the_key_and_the_cure(read, line, text):
    assert message(check_config, read(f"{TEXT}\n{line}\n")) == text


def test_mistakes_beside_classes_are_found_too(read):
    denoiser, data = (
        message(check_config, read(PURE.replace("dtype=torch.bfloat16", change)))
        for change in ("denoisers=1", "type='LatentDiffusion'")
    )
    assert denoiser == "model: missing 'type'"
    assert data == "model (LatentDiffusion): missing 'diffusion', 'vae'"
    config = read(PURE.replace("type=MovingDigits, length", "type=MovingDigits, lenght"))
    config.pop("model")
    assert message(check_config, config) == (
        "train_dataloader.dataset.lenght = 4: MovingDigits takes no 'lenght'; did you mean "
        "'length'?"
    )


class Passer(nn.Module):
    def __init__(self, width, **rest):
        super().__init__()
        self.width, self.rest = width, rest


class Heir(Passer):
    def __init__(self, height, **others):
        super().__init__(height, **others)


class Closed(nn.Module):
    def __init__(self, depth=1):
        super().__init__()


class ClosedHeir(Closed):
    def __init__(self, width=2, **rest):
        super().__init__(**rest)


def denoiser(**arguments):
    config = Config.fromstring(TEXT, ".py")
    config.model.denoiser = dict(arguments)
    return config


def test_free_arguments_are_free_and_inherited_ones_are_known():
    check_config(denoiser(type=Passer, width=1, anything=2))
    check_config(denoiser(type=Heir, height=1, anything=2))
    check_config(denoiser(type=ClosedHeir, width=1, depth=2))
    text = message(check_config, denoiser(type=ClosedHeir, detph=2))
    assert text == ("model.denoiser.detph = 2: ClosedHeir takes no 'detph'; did you mean 'depth'?")


def test_what_a_class_from_elsewhere_does_with_its_arguments_is_its_own_business():
    check_config(denoiser(type=Closed, depth=dict(type="its own name", anything=1)))


def test_overrides(read):
    config = read(TEXT)
    before = config_dict(config)
    apply_overrides(
        config,
        {
            "train_cfg.max_iters": 5,
            "param_scheduler.0.end": 7,
            "model.denoiser.size": (2, 8, 8),
            "model.diffusion.train_times.std": 0.5,  # new, but an argument
            "auto_scale_lr.base_batch_size": 8,  # new, with a place of its own
            "custom_hooks.0": dict(type="DenoiserEMAHook", decay=0.5),
            "work_dir": "somewhere",
        },
    )
    check_config(config)
    assert sorted(config_diff(before, config_dict(config))) == [
        "+ auto_scale_lr.base_batch_size: 8",
        "+ model.diffusion.train_times.std: 0.5",
        "+ work_dir: 'somewhere'",
        "custom_hooks.0.decay: 0.9 -> 0.5",
        "model.denoiser.size: [2, 4, 4] -> [2, 8, 8]",
        "param_scheduler.0.end: 1 -> 7",
        "train_cfg.max_iters: 2 -> 5",
    ]


def test_a_type_is_replaced_whatever_the_order(read):
    solver = "model.diffusion.solver"
    config = read(TEXT)
    apply_overrides(
        config, {f"{solver}.type": "mmsora.diffusion.Heun", f"{solver}._delete_": True}
    )
    assert config.model.diffusion.solver == dict(type="mmsora.diffusion.Heun")
    apply_overrides(config, {f"{solver}.eta": 0.1, f"{solver}.type": "Euler"})
    assert config.model.diffusion.solver == dict(type="Euler", eta=0.1)
    check_config(config)


def test_an_overridden_lazy_config_can_be_printed(read):
    config = read(PURE)
    apply_overrides(config, {"optim_wrapper.optimizer.type": "Adam"})
    assert "type='Adam'" in config.pretty_text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (
            "model.denoiser.detph",
            8,
            "Latte takes no 'detph'; did you mean 'model.denoiser.depth'?",
        ),
        (
            "model.guidance.scale",
            3,
            "LatentDiffusion takes no 'guidance'; did you mean 'model.diffusion.guidance.scale'?",
        ),
        (
            "modle.denoiser.depth",
            3,
            "a config takes no 'modle'; did you mean 'model.denoiser.depth'?",
        ),
        (
            "train_cgf.max_iters",
            3,
            "a config takes no 'train_cgf'; did you mean 'train_cfg.max_iters'?",
        ),
        (
            "num_classes",
            4,
            "'num_classes' is a name of the config file's own, which was read already; set "
            "model.conditioner.num_classes and model.denoiser.num_classes instead",
        ),
        ("custom_hooks.1.decay", 0.5, "custom_hooks is a list; '1' is none of 0 to 0"),
        ("custom_hooks.last.decay", 0.5, "custom_hooks is a list; 'last' is none of 0 to 0"),
        ("model.denoiser.size.0", 8, "model.denoiser.size is a tuple; set all of it"),
        ("train_cfg.max_iters.x", 8, "train_cfg.max_iters is 2, which has no keys"),
        (
            "default_hooks.timer.interval",
            8,
            "default_hooks.timer is not set; say in the config of which type it is",
        ),
        (
            "train_dataloader.batchsize",
            8,
            "train_dataloader takes no 'batchsize'; did you mean 'train_dataloader.batch_size'?",
        ),
    ],
)
def test_overrides_of_what_is_not_there(read, key, value, text):
    config = read(TEXT)
    before = config_dict(config)
    assert message(apply_overrides, config, {key: value}) == f"{key} = {value}: {text}"
    assert config_dict(config) == before


def test_a_new_type_must_take_what_is_left(read):
    assert message(apply_overrides, read(TEXT), {"model.diffusion.solver.type": "Heun"}) == (
        "model.diffusion.solver.type=Heun: Heun takes no 'eta'; add "
        "model.diffusion.solver._delete_=True to drop what the config sets there"
    )
    assert message(apply_overrides, read(TEXT), {"model.diffusion.solver.type": "Huen"}) == (
        "model.diffusion.solver: unknown SCHEDULERS name 'Huen'; did you mean 'Heun'?"
    )


def test_config_dict_is_plain(read):
    found = config_dict(read(PURE))
    assert json.loads(json.dumps(found)) == found
    assert found == dict(
        model=dict(denoiser=dict(type="mmsora.models.Latte"), dtype="torch.bfloat16"),
        train_dataloader=dict(
            dataset=dict(type="mmsora.datasets.MovingDigits", length=4),
            sampler=dict(type="mmengine.dataset.InfiniteSampler"),
        ),
        optim_wrapper=dict(optimizer=dict(type="torch.optim.AdamW", betas=[0.9, 0.99])),
    )
    built = Config(dict(a=nn.functional.relu, b=(1, (torch.optim.AdamW,))))
    assert config_dict(built) == dict(a="torch.nn.functional.relu", b=[1, ["torch.optim.AdamW"]])


@pytest.mark.parametrize("name", config_names())
def test_a_round_trip_builds_the_same_model(name):
    init_default_scope("mmsora")
    config = load_config(name)
    again = config_from_dict(json.loads(json.dumps(config_dict(config))))
    check_config(again)
    assert config_diff(config_dict(config), config_dict(again)) == []
    with torch.device("meta"):
        first, second = (MODELS.build(found.model) for found in (config, again))
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (first, second)]
    assert shapes[0] == shapes[1]
    assert repr(first) == repr(second)


def test_a_round_trip_makes_the_custom_imports(tmp_path, monkeypatch):
    (tmp_path / "parts_of_mine.py").write_text("")
    values = dict(custom_imports=dict(imports=["parts_of_mine"]))
    for function in (config_from_dict, lambda values: check_config(Config(values))):
        assert message(function, values) == (
            "custom_imports: No module named 'parts_of_mine'; is the folder that holds it on "
            "PYTHONPATH?"
        )
    monkeypatch.syspath_prepend(tmp_path)
    assert config_from_dict(values).custom_imports == values["custom_imports"]


def test_config_diff():
    old = dict(a=dict(b=1, c=[1, 2]), hooks=[dict(x=1), dict(y=2)], gone={}, same="s")
    new = dict(a=dict(b=2, c=[1, 2]), hooks=[dict(x=1), dict(y=3)], same="s", more=dict(z=None))
    assert config_diff(old, new) == [
        "a.b: 1 -> 2",
        "hooks.1.y: 2 -> 3",
        "- gone: {}",
        "+ more.z: None",
    ]
    assert config_diff(old, old) == []


def test_mistakes_that_only_show_at_building():
    def build(**changes):
        config = config_from_dict(config_dict(Config.fromstring(TEXT, ".py"))).model.denoiser
        with user_errors():
            DENOISERS.build(config | changes)

    assert message(lambda: build(depth=3)) == (
        "Latte: depth counts spatial and temporal blocks: even, not 3"
    )
    text = message(lambda: build(detph=3))
    assert text.startswith("Latte: TypeError: ")
    assert "'detph'" in text
    assert text.endswith("(MMSORA_TRACEBACK=1 shows where)")


def test_the_traceback_can_be_had(monkeypatch):
    bad = dict(type="Latte", in_channels=1, out_channels=1, size=(2, 4, 4), patch=2, width=8,
               depth=3, heads=2)  # fmt: skip
    with pytest.raises(UserError, match="^Latte: depth"), user_errors():
        DENOISERS.build(bad)
    monkeypatch.setenv("MMSORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="^depth"), user_errors():
        DENOISERS.build(bad)


def test_errors_of_other_code_pass_through():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("label")


def test_a_config_offers_choices_by_name():
    cfg = load_config("latte_moving_digits")
    cfg.samplers = {"paper": {"model.diffusion.grid.num_steps": 7}}
    check_config(cfg)
    with pytest.raises(UserError, match="the config has no sampler 'papers'; it offers paper"):
        apply_choice(cfg, "samplers", "papers")
    with pytest.raises(UserError, match="the config has no layout 'x'; it offers none"):
        apply_choice(cfg, "layouts", "x")
    apply_choice(cfg, "samplers", "paper")
    assert cfg.model.diffusion.grid.num_steps == 7
