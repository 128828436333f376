"""The steps and hours that a key has used, in its unfinished jobs and those that ended in the last 24 hours."""

import time

from guanaco.server.training.jobs.errors import quota
from guanaco.server.training.jobs.limits import WINDOW_SECONDS, TrainLimits
from guanaco.server.training.jobs.records import Job
from guanaco.server.training.jobs.store import JobStore
from guanaco.server.training.recipes import Recipe, num_held_out


class Usage:
    """Counts the use of keys over the jobs of a store."""

    def __init__(self, jobs: JobStore, limits: TrainLimits) -> None:
        self._jobs = jobs
        self._limits = limits

    def check_new(self, owner: str) -> None:
        """Raises RequestRefused if a key may not create another job now."""
        limits, recent = self._limits, self._recent(owner)
        num_open = sum(not job.status.is_final for job in recent)
        if num_open >= limits.max_jobs_per_key:
            raise quota(f"{num_open} jobs of this API key wait or run, the most that may: wait, or cancel one")
        if sum(job.step for job in recent) >= limits.max_steps_per_key:
            raise quota(f"this API key has used its {limits.max_steps_per_key} steps of 24 hours: try again later")
        if sum(job.train_seconds for job in recent) >= limits.max_hours_per_key * 3600:
            raise quota(f"this API key has used its {limits.max_hours_per_key:g} hours of 24: try again later")

    def check_planned(self, job: Job, num_rows: int) -> None:
        """Raises RequestRefused if a job with `num_rows` rows needs more steps than its key has left."""
        chosen, recipe = job.hyperparameters, Recipe()
        share = recipe.held_out if job.validation_file is None else 0.0
        rows = num_rows - num_held_out(num_rows, share, recipe.max_held_out)
        steps = -(-round((chosen.n_epochs or recipe.epochs) * rows) // (chosen.batch_size or recipe.batch_size))
        if self._steps_besides(job) + steps > self._limits.max_steps_per_key:
            raise quota(self._too_many_steps(steps), "training_file")

    def spent(self, job: Job) -> str | None:
        """Why a running job must end: it needs more steps than its key has left, or the hours are used up. None: it may
        go on."""
        if self._steps_besides(job) + max(job.step, job.steps) > self._limits.max_steps_per_key:
            return self._too_many_steps(max(job.step, job.steps))
        others = [other for other in self._recent(job.owner) if other.id != job.id]
        if sum(other.train_seconds for other in others) + job.train_seconds > self._limits.max_hours_per_key * 3600:
            return f"the {self._limits.max_hours_per_key:g} hours of training that this API key has in 24 are over"
        return None

    def _steps_besides(self, job: Job) -> int:
        return sum(other.step for other in self._recent(job.owner) if other.id != job.id)

    def _too_many_steps(self, steps: int) -> str:
        most = self._limits.max_steps_per_key
        return f"the job has {steps} steps, and this API key has {most} in 24 hours: train fewer rows or epochs"

    def _recent(self, owner: str) -> list[Job]:
        since = time.time() - WINDOW_SECONDS
        return [job for job in self._jobs.of(owner) if (job.finished_at or since) >= since]
