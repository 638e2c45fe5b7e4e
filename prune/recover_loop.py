"""The training loop of a recovery. What is of machines (devices, processes) is accelerate's."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.errors import DeploykitError
from deploykit.progress import Steps
from deploykit.prune.distill_losses import LOSSES, Lesson
from deploykit.prune.qat import PREFIX
from deploykit.prune.recover_checkpoint import load_checkpoint, save_checkpoint
from deploykit.prune.recover_data import Split
from deploykit.prune.recover_ema import moving_average
from deploykit.prune.recover_judge import Judge, autocast
from deploykit.prune.recover_options import RecoverOptions, rate_for
from deploykit.prune.recover_stop import EarlyStop, Judgement
from deploykit.prune.recover_weights import named

__all__ = ["Parts", "Training"]

Parts = Mapping[str, Mapping[str, float]]
"""By loss, by place, the weight of each part of the total."""

_PACED_STEPS = 4
_JUDGED_SHARE = 0.25  # of the time that evaluations may take, if they are to be several
_RANGES_FASTER = 10.0


@dataclass
class _State:
    """Where a training is; all of it goes into the checkpoint.

    Attributes:
        due: the step of the next evaluation.
    """

    step: int = 0
    due: int = 0
    total: int = 0
    evaluations: int = 1
    seconds: float = 0.0
    planned: bool = False
    finished: bool = False
    before: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


class Training:
    """Trains ``student`` in place; ``run`` returns the best averaged weights.

    Args:
        accelerator: accelerate's ``Accelerator``.
        student, teacher: return ``{"loss|place": value}`` for every part.
        names: the student's parameters that are trained.
        data: the images to train on; ``judge`` has those held out.
        checkpoint: a folder to write to and go on from, or None; ``run_id`` tells runs apart.
    """

    def __init__(
        self,
        accelerator: Any,
        student: fx.GraphModule,
        teacher: fx.GraphModule,
        parts: Parts,
        options: RecoverOptions,
        *,
        names: list[str],
        data: Split,
        judge: Judge,
        checkpoint: Path | None,
        run_id: str,
    ) -> None:
        self.accelerator, self.options, self.parts = accelerator, options, parts
        self.data, self.judge = data, judge
        self.names, self.checkpoint, self.run_id = names, checkpoint, run_id
        self.student = student.to(accelerator.device)
        self.teacher = teacher
        self.average = moving_average(self.student, options.ema_decay)
        self.stop = EarlyStop(options.patience, options.target_drop)
        self.state = _State(total=self._steps_asked(), evaluations=options.evaluations)
        self.best: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.moments: dict[tuple[str, str], Tensor] = {}
        self.since, self.began, self.judging = 0, 0.0, 0.0

    def run(self, steps: Steps) -> dict[str, Tensor]:
        """Train, or go on with the training that the checkpoint holds.

        Raises:
            DeploykitError: the loss is no longer a number.
        """
        self._restore()
        self.began = time.monotonic() - self.state.seconds
        if not self.state.before:
            judgement = self._judge(self.student)
            self.stop.update(judgement)
            self.best = self._copy(self.student)
            self.state.before = {"drop": judgement.drop, "kl": judgement.kl}
        if self.state.finished:
            return self.best
        optimizer = torch.optim.AdamW(self._groups())
        if not self.stop.reason:
            self._train(optimizer, steps)
        self.state.finished = True
        self.state.seconds = self._clock()
        self._save(optimizer)
        return self.best

    def _train(self, optimizer: torch.optim.Optimizer, steps: Steps) -> None:
        state, options, accelerator = self.state, self.options, self.accelerator
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, self._rate, last_epoch=state.step - 1
        )
        model, stepper, loader = accelerator.prepare(self.student, optimizer, self._batches())
        self._restore_moments(optimizer)  # accelerate moves what is there to the device
        trained = [p for p in self.student.parameters() if p.requires_grad]
        paced, paced_from = self._clock(), state.step
        with contextlib.ExitStack() as stack:
            state.due = state.due or self._next_stop()
            advance = stack.enter_context(steps(self._title(), state.due - state.step))
            for images, labels in loader:
                loss = self._loss(model, images, labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, options.clip)
                stepper.step()
                stepper.zero_grad()
                state.step += 1
                schedule.step()
                self.average.update_parameters(self.student)
                advance(1)
                if state.step == paced_from + 1:
                    paced = self._clock()  # the first step is slower than others
                if not state.planned and state.step == paced_from + 1 + _PACED_STEPS:
                    self._plan((self._clock() - paced) / _PACED_STEPS)
                    state.planned = True
                late = self._late()
                if state.step < state.due and not late:
                    continue
                stack.close()
                clock = self._clock()
                if paced_from + 1 < state.step < state.total:
                    # a busy machine's pace changes
                    self._plan((clock - paced) / (state.step - paced_from - 1))
                self._evaluate(float(schedule.get_last_lr()[0]))
                state.due = self._next_stop()
                paced += self._clock() - clock
                state.seconds = self._clock()
                self._save(optimizer)
                if late and not self.stop.reason:
                    self.stop.reason = f"{options.max_seconds:g} seconds are over"
                if self.stop.reason or state.step >= state.total:
                    return
                advance = stack.enter_context(steps(self._title(), state.due - state.step))

    def _loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(images.device, self.options.precision):
            with torch.no_grad():
                wanted = self.teacher(images)
            given = model(images)
        lesson = Lesson(labels, self.options.temperature)
        total = torch.zeros((), device=images.device)
        for loss, places in self.parts.items():
            for place, weight in places.items():
                key = f"{loss}|{place}"
                value = LOSSES[loss].compute(given[key], wanted[key], lesson)
                total = total + weight * value
                self.sums[key] = self.sums.get(key, 0) + value.detach().float()
        self.since += 1
        return total

    def _evaluate(self, rate: float) -> None:
        rows = torch.stack([self.sums[key] for key in sorted(self.sums)]) / self.since
        means = self.accelerator.reduce(rows, reduction="mean")
        values = dict(zip(sorted(self.sums), means.tolist(), strict=True))
        loss = sum(
            weight * values[f"{name}|{place}"]
            for name, places in self.parts.items()
            for place, weight in places.items()
        )
        if not math.isfinite(loss):
            message = f"the recovery's loss is no number at step {self.state.step}"
            raise DeploykitError(f"{message}; a lower recover.lr may help")
        judgement = self._judge(self.average.module)
        if self.stop.update(judgement):
            self.best = self._copy(self.average.module)
        self.state.history.append(
            {
                "step": self.state.step, "loss": loss, "parts": values, "lr": rate,
                "drop": judgement.drop, "agreement": judgement.agreement, "kl": judgement.kl,
            }
        )  # fmt: skip
        self.sums, self.since = {}, 0

    def _steps_asked(self) -> int:
        world = self.options.batch_size * int(self.accelerator.num_processes)
        return max(1, math.ceil(self.options.epochs * len(self.data.train) / world))

    def _judge(self, module: torch.nn.Module) -> Judgement:
        before = self._clock()
        judgement = self.judge(module)
        self.judging = self._clock() - before
        return judgement

    def _clock(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return time.monotonic() - self.began

    def _plan(self, step_seconds: float) -> None:
        """Cut the number of steps to what fits into the time, evaluations included.

        Where evaluations would take much of the time there are fewer of them.
        """
        state, limit = self.state, self.options.max_seconds
        if limit is None:
            return
        affordable = int(_JUDGED_SHARE * limit / max(self.judging, 1e-9))
        evaluations = max(1, min(self.options.evaluations, affordable))
        judging = self.judging * max(1, evaluations - len(state.history))
        left = limit - self._clock() - judging
        fits = state.step + max(0 if state.planned else 1, int(left / max(step_seconds, 1e-9)))
        from accelerate.utils import broadcast_object_list

        plan = [min(self._steps_asked(), fits), evaluations]
        state.total, state.evaluations = broadcast_object_list(plan)
        state.due = self._next_stop()

    def _late(self) -> bool:
        """Whether what is left is for one evaluation; the same answer in every process."""
        limit = self.options.max_seconds
        if limit is None:
            return False
        if self._clock() + self.judging > limit:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _rate(self, step: int) -> float:
        """Share of the highest learning rate: linear warm-up, then a cosine to 0."""
        warm = max(1, round(self.options.warmup * self.state.total))
        if step < warm:
            return (step + 1) / (warm + 1)
        through = (step - warm) / max(1, self.state.total - warm)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, through)))

    def _next_stop(self) -> int:
        """The step of the next evaluation: what is left, in equal parts."""
        left = self.state.total - self.state.step
        parts = max(1, self.state.evaluations - len(self.state.history))
        return self.state.step + max(1, math.ceil(left / parts))

    def _title(self) -> str:
        judged: Judgement | None = self.stop.best
        drop = "" if judged is None else f", best held-out drop {judged.drop:.1f}"
        loss = f", loss {self.state.history[-1]['loss']:.3g}" if self.state.history else ""
        return f"recover to step {self.state.due} of {self.state.total}{loss}{drop}"

    def _groups(self) -> list[dict[str, Any]]:
        """Matrices decay, vectors don't; learnt steps of roundings move faster."""
        options, named_parameters = self.options, dict(self.student.named_parameters())
        highest = options.lr or rate_for(self.state.before["kl"])
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name in self.names:
            parameter = named_parameters[name]
            ranges = name.startswith(PREFIX)
            decay = options.weight_decay if parameter.ndim > 1 and not ranges else 0.0
            rate = highest * (_RANGES_FASTER if ranges else 1.0)
            groups.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": params, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), params in groups.items()
        ]

    def _batches(self) -> Any:
        """Those of the steps that are left, of all processes."""
        each = self.options.batch_size * int(self.accelerator.num_processes)
        return self.data.batches(self.state.step * each, self.state.total * each)

    def _copy(self, module: torch.nn.Module) -> dict[str, Tensor]:
        return {name: value.cpu().clone() for name, value in named(module, self.names).items()}

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        if self.checkpoint is None:
            return
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            tensors: dict[str, Tensor] = {}
            for kind, module in (("student", self.student), ("average", self.average.module)):
                tensors |= {f"{kind}:{k}": v for k, v in named(module, self.names).items()}
            tensors |= {f"best:{name}": value for name, value in self.best.items()}
            for name, parameter in self._trained().items():
                held = optimizer.state.get(parameter, {})
                tensors |= {f"optimizer.{key}:{name}": value for key, value in held.items()}
            state = {**vars(self.state), "stop": self.stop.state()}
            save_checkpoint(self.checkpoint, self.run_id, state, tensors)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _restore(self) -> None:
        found = None if self.checkpoint is None else load_checkpoint(self.checkpoint, self.run_id)
        if found is None:
            return
        state, tensors = found
        self.stop.restore(state.pop("stop"))
        self.state = _State(**state)
        self.average.n_averaged.fill_(self.state.step)
        parameters, averages = self._trained(), dict(self.average.module.named_parameters())
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            if kind == "best":
                self.best[name] = value
            elif kind == "student":
                parameters[name].copy_(value)
            elif kind == "average":
                averages[name].copy_(value)
            else:
                self.moments[kind.removeprefix("optimizer."), name] = value

    def _restore_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """AdamW's state. Its counts of steps stay in main memory, where it wants them."""
        parameters = self._trained()
        for (part, name), value in self.moments.items():
            place = value if part == "step" else value.to(parameters[name].device)
            optimizer.state[parameters[name]][part] = place
        self.moments = {}

    def _trained(self) -> dict[str, Tensor]:
        every = dict(self.student.named_parameters())
        return {name: every[name] for name in self.names}
