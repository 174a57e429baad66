"""Reading an archive by Ray Data: processes on this machine, or on as many as a Ray cluster has."""

import logging
import os
from collections.abc import Iterator

from .archive import Job, Reader


class ClusterError(RuntimeError):
    """Ray is missing, or there is no such cluster; its text is one sentence that says what to do."""


class _Actor:
    """`Reader`, as Ray Data calls it."""

    def __init__(self, job: Job):
        self._reader = Reader(job)

    def __call__(self, row: dict) -> dict:
        read, failed, unfetched = self._reader(list(row["names"]))
        return {"read": read, "failed": failed, "unfetched": unfetched}


def read_by_ray(job: Job, names: list[str], size: int, workers: int, gpus: float) -> Iterator[tuple[int, int, int]]:
    """Read X-rays in parts of `size`; yields (read, failed, of these unfetched) of each part, in any order.

    A part whose worker dies is read again by another, and written only once.

    Args:
        job: its `out` and `weights` must be seen by every machine, and so must the names.
        names: of `sources.film_names`.
        size: X-rays in a part.
        workers: processes, of one core each.
        gpus: of each process, may be less than one.

    Raises:
        ClusterError: Ray is missing, or does not start.
    """
    try:
        import ray
    except ImportError:
        raise ClusterError("--engine ray needs Ray; install it: pip install 'ray[data]'.") from None
    if not ray.is_initialized():
        try:
            # RAY_ADDRESS names a cluster; without, one starts here, with a core more for what directs the workers
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers + 1, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="ERROR", **here)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(f"Ray does not start ({type(error).__name__}); is RAY_ADDRESS right?") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    parts = [{"names": names[i : i + size]} for i in range(0, len(names), size)]
    done = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        _Actor,
        fn_constructor_args=[job],
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    for row in done.iter_rows():
        yield row["read"], row["failed"], row["unfetched"]
