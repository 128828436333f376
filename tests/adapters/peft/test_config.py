"""adapter_config.json: PEFT's own code as oracle for what is matched, and a list of everything that is refused."""

import dataclasses
import json
import math

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft import config as adapter_config
from guanaco.adapters.peft.config import HARMLESS, REFUSED, UNDERSTOOD, parse_config

MODULES = [
    f"layers.{layer}.{module}"
    for layer in (0, 1, 2, 11)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]


def encode(**fields):
    return json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], **fields}).encode()


def resolved(**fields):
    return parse_config(encode(**fields)).resolve(MODULES)


def peft_resolved(**fields):
    """The same through PEFT's functions."""
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], **fields})
    result = {}
    for module in MODULES:
        name = f"model.{module}"
        if check_target_module_exists(config, name):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            result[module] = (rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
    return result


def test_every_peft_field_is_accounted_for():
    """A PEFT that adds a field fails here, and somebody decides what the field means for us."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    known = [HARMLESS, UNDERSTOOD, REFUSED.keys()]
    assert fields == set().union(*known)
    assert sum(len(group) for group in known) == len(fields), "a field is in two groups"


def test_peft_defaults_are_ours():
    ours = parse_config(encode())
    theirs = peft.LoraConfig(target_modules=["q_proj"])
    assert (ours.rank, ours.alpha, ours.use_rslora) == (theirs.r, theirs.lora_alpha, theirs.use_rslora)
    saved = {**theirs.to_dict(), "target_modules": ["q_proj"]}
    assert parse_config(json.dumps(saved, default=str).encode()).notes == ()


NAMES = ["q_proj", "o_proj", "gate_proj", "down_proj", "self_attn.q_proj", "proj", "model.layers.1.mlp.gate_proj", "x"]
PATTERNS = [
    r".*\.mlp\..*",
    r"model\.layers\.\d\..*_proj",
    r".*(q|down)_proj",
    r".*\.layers\.(0|11)\..*",
    "q_proj",
    ".*",
]
KEYS = [
    *["q_proj", "gate_proj", "mlp.down_proj", "layers.1.mlp.gate_proj", "model.layers.11.self_attn.q_proj", "proj"],
    *["^model.layers.0.mlp.down_proj", "^layers.0.mlp.down_proj", r"model\.layers\.1\.self_attn\.o_proj", "q_proj$"],
    *[
        r".*layers\.(0|1)\.mlp.*",
        r"layers\.\d+\.self_attn\.[qo]_proj",
        "gate_proj|down_proj",
        "q.proj",
        "elf_attn.q_proj",
    ],
    *["model^layers", "layers.1.mlp..down_proj", "layers.11"],
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    targets=st.one_of(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.sampled_from(PATTERNS)),
    exclude=st.one_of(st.none(), st.lists(st.sampled_from(NAMES), max_size=2), st.sampled_from(PATTERNS)),
    layers=st.one_of(st.none(), st.integers(0, 3), st.lists(st.sampled_from([0, 1, 2, 11, 5]), max_size=3)),
    layers_pattern=st.sampled_from([None, "layers", ["layers"], ["h", "layers"], "blocks", "model.layers"]),
    ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(st.sampled_from(KEYS), st.one_of(st.integers(1, 64), st.floats(0.5, 8)), max_size=4),
    rank=st.integers(1, 128),
    alpha=st.sampled_from([0, 1, 16, 0.5, -4]),
    rslora=st.booleans(),
)
def test_matches_as_peft_does(targets, exclude, layers, layers_pattern, ranks, alphas, rank, alpha, rslora):
    if isinstance(targets, str) or layers is None or layers == []:
        layers, layers_pattern = None, None
    fields = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": layers_pattern,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
    }
    assert resolved(**fields) == peft_resolved(**fields)


def test_first_matching_pattern_counts():
    assert resolved(rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 4})["layers.1.self_attn.q_proj"][0] == 2
    assert resolved(rank_pattern={"layers.1.self_attn.q_proj": 4, "q_proj": 2})["layers.1.self_attn.q_proj"][0] == 4


def test_all_linear_is_everything():
    assert list(resolved(target_modules="all-linear")) == MODULES
    assert list(resolved(target_modules="All-Linear", exclude_modules=["q_proj", "mlp.gate_proj"])) == [
        module for module in MODULES if not module.endswith(("q_proj", "gate_proj"))
    ]


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_leave_the_base_alone(kind):
    assert resolved(init_lora_weights=kind)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "lora_dropout": 0.5,
            "inference_mode": True,
            "task_type": "SEQ_CLS",
            "revision": "main",
            "peft_version": "0.21",
        },
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "os"}},
        {"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2}, "corda_config": {}, "lora_ga_config": {"x": 1}},
        {"velora_config": None, "qalora_group_size": 32, "runtime_config": {"ephemeral_gpu_offload": True}},
        {
            "bias": "none",
            "modules_to_save": [],
            "target_parameters": None,
            "layer_replication": None,
            "use_dora": False,
        },
        {"base_model_name_or_path": "/gscratch/zlab/llama/7B"},
        {
            "bias": None,
            "megatron_core": "megatron.core",
            "megatron_config": None,
            "enable_lora": None,
            "merge_weights": False,
        },
    ],
)
def test_harmless_fields_change_nothing_and_are_silent(fields):
    parsed = parse_config(encode(**fields))
    assert parsed.resolve(MODULES) == resolved()
    assert parsed.notes == ()


def test_unknown_keys_are_noted():
    data = encode(use_newlora=True, other_new=None, third=0)
    assert parse_config(data).notes == ("use_newlora is not known here and was ignored",)


REFUSALS = [
    ("peft_type_missing", "peft_type", {"peft_type": None}),
    *[
        ("peft_type_unsupported", "peft_type", {"peft_type": kind})
        for kind in ("ADALORA", "IA3", "LOHA", "VERA", "OFT", "PREFIX_TUNING", "lora", "\x1b[2J", 3, ["LORA"])
    ],
    ("alora_unsupported", "alora_invocation_tokens", {"alora_invocation_tokens": [1, 2]}),
    ("arrow_unsupported", "arrow_config", {"arrow_config": {"top_k": 3}}),
    ("bias_unsupported", "bias", {"bias": "all"}),
    ("bias_unsupported", "bias", {"bias": "lora_only"}),
    ("weight_tying_unsupported", "ensure_weight_tying", {"ensure_weight_tying": True}),
    ("fan_in_fan_out_unsupported", "fan_in_fan_out", {"fan_in_fan_out": True}),
    ("kasa_unsupported", "kasa_config", {"kasa_config": {"beta": 0.1}}),
    ("layer_replication_unsupported", "layer_replication", {"layer_replication": [[0, 2], [1, 3]]}),
    ("lora_bias_unsupported", "lora_bias", {"lora_bias": True}),
    ("megatron_unsupported", "megatron_config", {"megatron_config": {"x": 1}}),
    ("modules_to_save_unsupported", "modules_to_save", {"modules_to_save": ["lm_head"]}),
    ("monteclora_unsupported", "monteclora_config", {"monteclora_config": {"x": 1}}),
    ("target_parameters_unsupported", "target_parameters", {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    ("trainable_tokens_unsupported", "trainable_token_indices", {"trainable_token_indices": [5]}),
    ("trainable_tokens_unsupported", "trainable_token_indices", {"trainable_token_indices": {"embed_tokens": [5]}}),
    ("bdlora_unsupported", "use_bdlora", {"use_bdlora": {"nblocks": 2}}),
    ("dora_unsupported", "use_dora", {"use_dora": True}),
    ("dora_unsupported", "use_dora", {"use_dora": "yes"}),
    ("qalora_unsupported", "use_qalora", {"use_qalora": True}),
    ("velora_unsupported", "velora_config", {"velora_config": {"num_groups": 4}}),
    *[
        ("init_changes_base", "init_lora_weights", {"init_lora_weights": kind})
        for kind in ("pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga")
    ],
    ("init_unknown", "init_lora_weights", {"init_lora_weights": "newinit"}),
    ("init_unknown", "init_lora_weights", {"init_lora_weights": 7}),
    *[("bad_rank", "r", {"r": rank}) for rank in (0, -1, 8.0, True, "8", None, [8], 2**40)],
    *[("bad_alpha", "lora_alpha", {"lora_alpha": alpha}) for alpha in ("16", True, None, 1e30, [16])],
    ("bad_field", "use_rslora", {"use_rslora": "no"}),
    ("no_targets", "target_modules", {"target_modules": None}),
    ("no_targets", "target_modules", {"target_modules": []}),
    ("no_targets", "target_modules", {"target_modules": ""}),
    ("bad_field", "target_modules", {"target_modules": {"q_proj": 1}}),
    ("bad_field", "target_modules", {"target_modules": ["q_proj", 3]}),
    ("bad_field", "target_modules", {"target_modules": ["q_proj", ""]}),
    ("bad_field", "exclude_modules", {"exclude_modules": 3}),
    ("bad_field", "layers_to_transform", {"layers_to_transform": "0"}),
    ("bad_field", "layers_to_transform", {"layers_to_transform": [-1]}),
    ("bad_field", "layers_to_transform", {"layers_to_transform": True}),
    ("conflicting_fields", "layers_to_transform", {"target_modules": ".*", "layers_to_transform": [0]}),
    ("conflicting_fields", "layers_pattern", {"layers_pattern": "layers"}),
    ("pattern_unsupported", "layers_pattern", {"layers_pattern": "lay|h", "layers_to_transform": [0]}),
    ("bad_field", "rank_pattern", {"rank_pattern": ["q_proj"]}),
    ("bad_rank", "rank_pattern", {"rank_pattern": {"q_proj": 0}}),
    ("bad_alpha", "alpha_pattern", {"alpha_pattern": {"q_proj": "x"}}),
    ("too_many_patterns", "rank_pattern", {"rank_pattern": {f"q{i}": 1 for i in range(3000)}}),
    ("pattern_unsupported", "target_modules", {"target_modules": "^(?!.*visual).*q_proj"}),
    ("pattern_unsupported", "target_modules", {"target_modules": "(((("}),
    ("pattern_unsupported", "exclude_modules", {"exclude_modules": "[z-a]"}),
    ("pattern_unsupported", "rank_pattern", {"rank_pattern": {r"(a)\1": 4}}),
    ("pattern_unsupported", "rank_pattern", {"rank_pattern": {f"({'(.*)*' * 9}){i}": 4 for i in range(2000)}}),
    ("scale_too_large", "lora_alpha", {"lora_alpha": 9000, "r": 8}),
    ("scale_too_large", "lora_alpha", {"lora_alpha": -9000, "r": 8}),
    ("scale_too_large", "lora_alpha", {"alpha_pattern": {"q_proj": 1e8}}),
]


@pytest.mark.parametrize(
    ("code", "field", "fields"), REFUSALS, ids=[f"{c}-{i}" for i, (c, _, _) in enumerate(REFUSALS)]
)
def test_refused_by_name(code, field, fields):
    with pytest.raises(AdapterError) as error:
        resolved(**fields)
    assert (error.value.code, error.value.field) == (code, field)
    message = str(error.value)
    assert message.isascii()
    assert message.isprintable()
    assert field in message or code in ("scale_too_large",)


@pytest.mark.parametrize(
    "data", [b"", b"{}x", b"[]", b'{"r": 1, "r": 2}', b'{"lora_alpha": NaN}', b"\xff", b"\x80\x04."]
)
def test_files_that_are_no_json(data):
    with pytest.raises(AdapterError) as error:
        parse_config(data)
    assert (error.value.code, error.value.field) == ("bad_config", "adapter_config.json")


def test_refusals_name_only_fields_that_exist():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert adapter_config.REFUSED.keys() <= fields
    covered = {field for _, field, _ in REFUSALS}
    assert adapter_config.REFUSED.keys() <= covered, "a refused field has no test"
