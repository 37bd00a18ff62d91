"""What `salt-vla train` prints when it is asked what a run would take, instead of running it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from salt_vla.cli.printing import print_json, print_table
from salt_vla.config import TrainConfig, parse_bytes
from salt_vla.errors import ConfigError, ResourceError


@dataclass(frozen=True)
class Ahead:
    """What is wanted to be known before a run, and of which machine.

    Attributes:
        plan: say what the run would take on --gpus devices, and do not run it.
        find_batch: say the largest batch below --memory-limit, and do not run.
        gpus: of the plan, and of the batch; not given: one of this machine, or its processor.
        tflops: what each of them is assumed to sustain.
        measure: with --plan, do 20 steps here; with --find-batch, one of the batch that was found; see.
        json: the plan or the batch as JSON.
    """

    plan: bool = False
    find_batch: bool = False
    gpus: int | None = None
    tflops: float | None = None
    measure: bool = False
    json: bool = False

    @property
    def is_asked(self) -> bool:
        return self.plan or self.find_batch

    def require_meaning(self, branch: str | None, max_steps: int | None) -> None:
        """Raises `ConfigError` where an option would do nothing."""
        if self.plan and self.find_batch:
            raise ConfigError("--plan and --find-batch are two questions: ask one at a time")
        which = "--plan" if self.plan else "--find-batch" if self.find_batch else ""
        of_run, of_plan, of_batch = ("",), ("--plan",), ("--find-batch",)
        meant_for = {
            "--gpus": (self.gpus is not None, of_plan + of_batch),
            "--tflops": (self.tflops is not None, of_plan),
            "--measure": (self.measure, of_plan + of_batch),
            "--json": (self.json, of_plan + of_batch),
            "--branch": (branch is not None, of_run),
            "--max-steps": (max_steps is not None, of_run + of_plan),
        }
        for option, (is_given, kinds) in meant_for.items():
            if is_given and which not in kinds:
                cure = f"give {' or '.join(kinds)} with it" if not which else f"leave it out with {which}"
                raise ConfigError(f"{option} would do nothing here: {cure}")

    def tell(self, config: TrainConfig, max_steps: int | None = None, has_data: bool = False) -> None:
        """The answer. Raises `UserError`s of options, and of data that were given and cannot be read."""
        if self.plan:
            show_plan(config, self.gpus, self.tflops, max_steps, self.measure, self.json, has_data)
        else:
            show_largest_batch(config, 1 if self.gpus is None else self.gpus, self.measure, self.json)


def show_plan(
    config: TrainConfig,
    gpus: int | None,
    tflops: float | None,
    max_steps: int | None,
    measure: bool,
    json: bool,
    has_data: bool,
) -> None:
    """`has_data`: they were asked for by name, and not the recipe's, which may be of another machine."""
    from salt_vla.jobs.plan import describe_run, plan_run

    plan = plan_run(config, gpus, tflops, max_steps, measure, must_have_clips=has_data)
    if json:
        print_json(plan.as_json())
    else:
        print_table(describe_run(plan), ("field", "value"))


def show_largest_batch(config: TrainConfig, gpus: int, measure: bool, json: bool) -> None:
    """Raises `ResourceError` where not even one clip fits."""
    from salt_vla.jobs.resources import does_not_fit, find_batch, room_for_step
    from salt_vla.jobs.train_plan import describe_fitting
    from salt_vla.jobs.train_trial import confirmed
    from salt_vla.training.runtime import resolve_device

    config = resolve_device(config)
    given = config.runtime.memory_limit
    limit = parse_bytes(given) if given else room_for_step(config)[0]
    found = find_batch(config, limit, gpus)
    if not found.batch_size:
        one = replace(config, batch_size=gpus, grad_accum_steps=1)
        raise ResourceError(does_not_fit(one, found.memory, f"the limit is {limit / 1e9:.2f} GB", gpus))
    measured = confirmed(config, found, gpus) if measure else None
    answer = describe_fitting(config, found, measured, gpus)
    if json:
        print_json(answer)
        return
    print(f"largest batch in one piece: batch_size={found.batch_size} (limit {limit / 1e9:.2f} GB)")
    print(f"  {found.memory}; one clip more: {found.memory.of_clip / 1e9:.3f} GB")
    print(answer["pieces"])
    if found.accumulation:
        print(f"  {found.with_accumulation}")
    if measure:
        size, peak = answer["measured_batch_size"], answer["measured_bytes"]
        print(f"measured: batch_size={size} took {peak / 1e9:.2f} GB" if size else "measured: none fitted")
