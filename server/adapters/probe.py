"""Tries a version out before a name stands for it: does it change the base's logits, and are these finite?

The engine computes two background requests, with and without the version. Used by the adapter manager.
"""

import math
import time

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.store import OnStage
from guanaco.models.error_codes import ErrorCode
from guanaco.server.engine.async_engine import AsyncEngine, EngineUnavailable, ProbeFailed


class EffectProbe:
    """Probes versions with one prompt."""

    def __init__(self, engine: AsyncEngine, token_ids: tuple[int, ...], on_stage: OnStage) -> None:
        """token_ids: the prompt. on_stage: called with "probe" and the seconds of each probe."""
        self._engine = engine
        self._token_ids = token_ids
        self._on_stage = on_stage

    async def effect(self, version: str) -> float:
        """The largest change of a logit that a version makes. Raises AdapterError if it is zero, infinite or NaN, or
        if the engine could not run the probe."""
        started = time.monotonic()
        try:
            effect = await self._engine.probe_adapter(version, self._token_ids)
        except (ProbeFailed, EngineUnavailable) as error:
            if isinstance(error, ProbeFailed) and error.code == ErrorCode.NUMERICAL_ERROR:
                raise _not_finite() from None
            raise AdapterError(
                ErrorCode.PROBE_FAILED, f"the adapter could not be tried out ({error}); try again"
            ) from None
        finally:
            self._on_stage("probe", time.monotonic() - started)
        if not math.isfinite(effect):
            raise _not_finite()
        if effect == 0:
            raise AdapterError(ErrorCode.ZERO_EFFECT, "the adapter changes nothing: the logits are those of the base")
        return effect


def _not_finite() -> AdapterError:
    return AdapterError(ErrorCode.EFFECT_NOT_FINITE, "with this adapter the model computes NaN or infinity")
