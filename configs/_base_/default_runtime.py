"""What every run shares: scope, hooks, log, seed."""

from mmengine.hooks import (
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
    RuntimeInfoHook,
)
from mmengine.runner import LogProcessor

from mmsora.engine import (
    InterruptHook,
    LatentCacheHook,
    MeanLossHook,
    ReportHook,
    SafeCheckpointHook,
    SoraRunner,
    TelemetryHook,
    TimeLossHook,
    WatchdogHook,
)

default_scope = "mmsora"
runner_type = SoraRunner

default_hooks = dict(
    runtime_info=dict(type=RuntimeInfoHook),
    mean_loss=dict(type=MeanLossHook),
    timer=dict(type=IterTimerHook),
    sampler_seed=dict(type=DistSamplerSeedHook),
    telemetry=dict(type=TelemetryHook, interval=10),
    time_loss=dict(type=TimeLossHook, interval=100),
    logger=dict(type=LoggerHook, interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=SafeCheckpointHook, interval=1000, max_keep_ckpts=3),
    interrupt=dict(type=InterruptHook),
    latent_cache=dict(type=LatentCacheHook),
    report=dict(type=ReportHook, interval=100),
    watchdog=dict(type=WatchdogHook),
)
log_processor = dict(type=LogProcessor, window_size=10, by_epoch=False)
env_cfg = dict(cudnn_benchmark=True, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
randomness = dict(seed=0)
log_level = "INFO"
load_from = None
resume = False
