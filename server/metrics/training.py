"""Metrics of training over the API: jobs by state, the running job's progress, files.

The numbers are read at each scrape. No label holds a client's text: ids and models of jobs are only in the API. A part
of `metrics`.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Numbers(Protocol):
    """The numbers of one moment. jobs: state → how many. step, steps, train_seconds: of the running job."""

    @property
    def jobs(self) -> dict[str, int]: ...
    @property
    def num_files(self) -> int: ...
    @property
    def num_file_bytes(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def train_seconds(self) -> float: ...


class TrainingCollector(Collector):
    """The series `guanaco_training_*`."""

    def __init__(self, registry: CollectorRegistry, numbers: Callable[[], Numbers]) -> None:
        self._numbers = numbers
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        now = self._numbers()
        jobs = GaugeMetricFamily(
            "guanaco_training_jobs", "Fine-tuning jobs that are kept, by state.", labels=["status"]
        )
        for status, count in now.jobs.items():
            jobs.add_metric([status], count)
        yield jobs
        for name, text, value in (
            ("step", "The running job's last logged step; 0: none runs.", now.step),
            ("steps", "The running job's steps in all; 0: not known.", now.steps),
            ("job_seconds", "Seconds that the running job has trained.", now.train_seconds),
            ("files", "Uploaded files and result files.", now.num_files),
            ("file_bytes", "Bytes of these files.", now.num_file_bytes),
        ):
            yield GaugeMetricFamily(f"guanaco_training_{name}", text, value=value)
