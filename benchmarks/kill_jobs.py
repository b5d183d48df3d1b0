"""The jobs that `kill.py` kills: every base, by Trainer and by a custom loop, of workers of one process or two."""

from __future__ import annotations

from kill_runs import SAVE_STEPS, Job

RECIPE = (
    "recipes/image/train.py --resume_from_checkpoint true --width 4 --max_train_samples 64 "
    "--max_eval_samples 32 --per_device_train_batch_size 4 --per_device_eval_batch_size 16 --num_train_epochs 2 "
    f"--logging_steps 3 --disable_tqdm 1 --save_strategy steps --save_steps {SAVE_STEPS} --eval_strategy steps "
    "--eval_steps 4 --sync_every 3 --timeout_seconds 60"
)
LOOP = f"benchmarks/kill_accelerate.py --save_steps {SAVE_STEPS} --eval_steps 4 --sync_every 3 --timeout_seconds 60"
BASES = {
    "local_sgd": "",
    "sgp": "--base sgp",
    "osgp": "--base osgp --staleness 2",
    "dpsgd": "--base dpsgd",
    "all_reduce": "--base all_reduce",
    "no average": "--base sgp --exact_average false",
}
JOBS = {
    **{
        f"Trainer, {base}": Job(f"{RECIPE} --save_total_limit {1 + n % 2} {flags}")
        for n, (base, flags) in enumerate(BASES.items())
    },
    **{
        f"Accelerate, {base}": Job(f"{LOOP} --save_total_limit {1 + n % 2} {flags}")
        for n, (base, flags) in enumerate(BASES.items())
    },
    "Trainer, osgp, 3 processes": Job(f"{RECIPE} --save_total_limit 2 {BASES['osgp']}", 3),
    "Accelerate, local_sgd, 3 processes": Job(f"{LOOP} --save_total_limit 1", 3),
}
NODE_BASES = {
    **{base: BASES[base] for base in ("local_sgd", "sgp", "osgp", "no average")},
    "overlapped": "--overlap_steps 2",
    "int8": "--compression int8",
    "sharded": "--shard_slow_state true",
}
# Two workers of two processes: eight steps, with two rounds and four saves, for four processes take long to start.
NODE_JOBS = {
    f"{surface}, {base}, 2 x 2 processes": Job(
        f"{command} --processes_per_worker 2 --save_total_limit {1 + n % 2} {flags}", 4
    )
    for surface, command in (("Trainer", RECIPE), ("Accelerate", f"{LOOP} --steps 8"))
    for n, (base, flags) in enumerate(NODE_BASES.items())
}
SHARD_LOOPS = {
    "Trainer": (
        "benchmarks/kill_trainer.py --max_steps 8 --per_device_train_batch_size 4 --learning_rate 0.01 --use_cpu "
        f"true --logging_steps 3 --disable_tqdm true --report_to none --save_strategy steps --save_steps {SAVE_STEPS} "
        "--eval_strategy steps --eval_steps 4 --sync_every 3 --timeout_seconds 60"
    ),
    "Accelerate": f"{LOOP} --steps 8",
}
SHARD_BASES = {name: flags for name, flags in NODE_BASES.items() if name != "no average"} | {
    "local_sgd": "--inner_state reset"
}
# Each base once with each kind of save.
SHARD_JOBS = {
    f"{surface}, {base}, 2 x 2 shards": Job(
        f"{command} --shards 2 --state_dict_type {('FULL', 'SHARDED')[(n + m) % 2]}_STATE_DICT "
        f"--save_total_limit {1 + n // 2 % 2} {flags}",
        4,
    )
    for m, (surface, command) in enumerate(SHARD_LOOPS.items())
    for n, (base, flags) in enumerate(SHARD_BASES.items())
}
JOBS_OF = {(1, 1): JOBS, (2, 1): NODE_JOBS, (1, 2): SHARD_JOBS, (2, 2): NODE_JOBS | SHARD_JOBS}


def longer(name: str, job: Job) -> Job:
    """For ten kills: 48 steps."""
    if not name.startswith("Trainer"):
        flags = "--steps 48"
    else:
        flags = "--max_steps 48" if name in SHARD_JOBS else f"--num_train_epochs {3 * job.processes}"
    return Job(f"{job.command} {flags}", job.processes)
