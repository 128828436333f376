"""From settings to a running program: the one place where models, adapters, kernels and engine are introduced.

Everything is loaded and checked here, before the first request; what is wrong leaves as one typed error. Used by
`serve`, `generate` and `bench`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from guanaco.adapters.registry import AdapterRegistry, parse_adapter_option
from guanaco.adapters.slot_store import SlotStore
from guanaco.adapters.slot_table import SlotTable
from guanaco.adapters.weights import AdapterLimits
from guanaco.kernels import Ops, load_ops
from guanaco.models.chat_template import ChatTemplate, named_template
from guanaco.models.demo import DEMO_NAME, demo_adapters, ensure_demo_model
from guanaco.models.hub import resolve_model
from guanaco.models.kv_cache import PagedKVCache, block_bytes
from guanaco.models.loader import LoadedModel, load_model
from guanaco.models.tokenizer import Tokenizer, reconcile_special_ids
from guanaco.server.config import Settings
from guanaco.server.engine.engine import Engine
from guanaco.server.engine.model_runner import ModelRunner
from guanaco.server.engine.request import LoraRef
from guanaco.server.errors import CommandError
from guanaco.server.machine import Machine, look
from guanaco.server.plan import KvRequest, MemoryPlan, plan_memory
from guanaco.server.progress import Progress
