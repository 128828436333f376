"""Base and adapters in one forward pass: each row as if it were alone, and as PEFT computes it."""

from random import Random
from typing import NamedTuple

import peft
import pytest
import torch

from guanaco.adapters.peft.weights import load_adapter
from guanaco.adapters.residency.slot_store import SlotStore
from guanaco.adapters.residency.slot_table import SlotTable
from guanaco.kernels.lora_batch import LoraBatch
from guanaco.models.loading.loader import load_model
from support.adapters.tiny_adapters import Watermarks, make_adapter
from support.models.oracles import PagedRun, oracle_logits, reference_ops, relative_error, transformers_oracle
from support.models.tiny_models import make_tiny_llama

CPU = torch.device("cpu")
ALONE = 1e-5  # between batch shapes; measured: 2e-6
ORACLE = 1e-4  # for fp32 compute; measured: 2e-6

ADAPTERS = {
    "small": {"rank": 1, "alpha": 2, "modules": ["q_proj", "v_proj"]},
    "guanaco": {"rank": 64, "alpha": 16, "dtype": torch.bfloat16},
    "mlp": {"rank": 8, "alpha": 16, "modules": ["gate_proj", "up_proj", "down_proj"], "dtype": torch.float16},
    "odd": {
        "rank": 7,
        "alpha": 3,
        "use_rslora": True,
        "modules": ["o_proj", "k_proj"],
        "scale_up": 0.4,
        "alpha_pattern": {r"layers\.1\..*": 5},
    },
    "fifth": {"rank": 3, "alpha": 8},
    "sixth": {"rank": 16, "alpha": 4, "modules": ["down_proj"]},
}


class Setting(NamedTuple):
    model: object
    loaded: dict
    oracle: object  # a PeftModel over the dense weights, every adapter in it

    def expected(self, name, ids):
        """PEFT's logits of every position; None is the base."""
        if name is None:
            with self.oracle.disable_adapter():
                return oracle_logits(self.oracle, ids)
        self.oracle.set_adapter(name)
        return oracle_logits(self.oracle, ids)

    def store(self, order, num_slots=None):
        """A store with these adapters in slots 0, 1, …"""
        store = SlotStore(self.model.lora_targets, num_slots or len(order), CPU)
        for slot, name in enumerate(order):
            store.load(slot, self.loaded[name])
        return store


@pytest.fixture(scope="module", params=["gqa", "odd"])
def setting(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    base = make_tiny_llama(root / "base", kind=request.param)
    model = load_model(base, reference_ops()).model
    targets = model.lora_targets
    paths = {
        name: make_adapter(root / name, targets, seed=seed, **fields)
        for seed, (name, fields) in enumerate(ADAPTERS.items())
    }
    first, *others = paths
    oracle = peft.PeftModel.from_pretrained(transformers_oracle(base), paths[first], adapter_name=first)
    for name in others:
        oracle.load_adapter(paths[name], adapter_name=name)
    loaded = {name: load_adapter(path, targets) for name, path in paths.items()}
    return Setting(model, loaded, oracle.eval())


def random_ids(seed, count, vocab_size=384):
    rng = Random(seed)
    return [rng.randrange(vocab_size) for _ in range(count)]


def rows_of(work, names, slots):
    """The (slot, scale) entries of every row of a step, given each sequence's adapter name or None."""
    return [((slots[names[s]], 1.0),) if names[s] else () for s, tokens in work for _ in tokens]


def run_mixed(setting, sequences, names, table, slots, *, chunk=9, model=None):
    """All sequences in one cache, a chunk of each per step; logits of every position, per sequence."""
    run = PagedRun(model or setting.model)
    pieces = [[] for _ in sequences]
    longest = max(map(len, sequences))
    for start in range(0, longest, chunk):
        work = [(i, ids[start : start + chunk]) for i, ids in enumerate(sequences) if ids[start : start + chunk]]
        lora = LoraBatch.build(rows_of(work, names, slots), table, CPU)
        parts = run.step(work, every_row=True, lora=lora).split([len(tokens) for _, tokens in work])
        for (i, _), part in zip(work, parts, strict=True):
            pieces[i].append(part)
    return [torch.cat(parts) for parts in pieces]


NAMES = [None, "small", "guanaco", None, "mlp", "odd", "guanaco"]
SEQUENCES = [random_ids(seed, length) for seed, length in enumerate((20, 33, 9, 1, 18, 27, 40))]


@pytest.fixture(scope="module")
def mixed(setting):
    order = ["odd", "small", "mlp", "guanaco"]
    slots = {name: slot for slot, name in enumerate(order)}
    return run_mixed(setting, SEQUENCES, NAMES, setting.store(order).table, slots)


def test_each_row_as_if_it_were_alone(setting, mixed):
    for ids, name, together in zip(SEQUENCES, NAMES, mixed, strict=True):
        store = setting.store([name] if name else [])
        alone = run_mixed(setting, [ids], [name], store.table, {name: 0}, chunk=64)[0]
        assert relative_error(together, alone) < ALONE


def test_each_row_as_peft_computes_it(setting, mixed):
    for ids, name, together in zip(SEQUENCES, NAMES, mixed, strict=True):
        assert relative_error(together, setting.expected(name, ids)) < ORACLE


def test_adapters_are_far_apart(setting):
    """What makes the two tests above worth something: every adapter changes the logits by more than any tolerance."""
    ids = random_ids(99, 30)
    outcomes = [setting.expected(name, ids) for name in (None, *ADAPTERS)]
    for i, one in enumerate(outcomes):
        for other in outcomes[:i]:
            assert relative_error(one, other) > 0.05


def test_planted_swap_of_two_slots_is_seen(setting):
    """The same comparison with two adapters in each other's place fails, for their rows and only for these."""
    order = ["small", "odd", "mlp", "guanaco"]
    slots = {name: slot for slot, name in enumerate(order)}
    store = setting.store(order)
    store.load(slots["small"], setting.loaded["odd"])
    store.load(slots["odd"], setting.loaded["small"])
    for ids, name, row in zip(SEQUENCES, NAMES, run_mixed(setting, SEQUENCES, NAMES, store.table, slots), strict=True):
        error = relative_error(row, setting.expected(name, ids))
        assert (error > 0.02) == (name in ("small", "odd")), (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_rows_do_not_notice_adapters(tmp_path, dtype):
    """Bit for bit, at the same shape: with adapters beside them, with an adapter batch of base rows, and without."""
    model = load_model(make_tiny_llama(tmp_path, kind="gqa"), reference_ops(dtype)).model
    names = [None, "guanaco", None, "mlp", "small"]
    sequences = [random_ids(seed, length) for seed, length in enumerate((7, 5, 1, 12, 3))]
    order = ["mlp", "guanaco", "small"]
    make = {
        name: load_adapter(make_adapter(tmp_path / name, model.lora_targets, **ADAPTERS[name]), model.lora_targets)
        for name in order
    }
    store = SlotStore(model.lora_targets, 3, CPU)
    for slot, name in enumerate(order):
        store.load(slot, make[name])
    slots = {name: slot for slot, name in enumerate(order)}
    work = list(enumerate(sequences))
    entries = rows_of(work, names, slots)
    results = []
    for lora in (
        LoraBatch.build(entries, store.table, CPU),
        LoraBatch.build([()] * len(entries), store.table, CPU),
        None,
    ):
        run = PagedRun(model, dtype=dtype)
        first = run.step(work, every_row=True, lora=lora)
        decode = [(i, [17]) for i in range(5)]
        narrow = (
            None
            if lora is None
            else LoraBatch.build(rows_of(decode, names, slots) if lora.slots.numel() else [()] * 5, store.table, CPU)
        )
        results.append((first, run.step(decode, lora=narrow)))
    base_rows = [row for row, entry in enumerate(entries) if not entry]
    for first, second in results[1:]:
        assert torch.equal(first[base_rows], results[0][0][base_rows])
        assert torch.equal(second[[0, 2]], results[0][1][[0, 2]])
        assert not torch.equal(first, results[0][0]), "the adapters' own rows do differ"


def test_more_adapters_than_slots(setting, proof_count):
    """Six adapters and the base over three slots: ledger and store together, sequences joining and leaving."""
    rng = Random(5)
    table, store = SlotTable(3), SlotStore(setting.model.lora_targets, 3, CPU)
    versions = {setting.loaded[name].version: name for name in ADAPTERS}
    running = {}
    run = PagedRun(setting.model, num_blocks=4000)
    checked = 0
    for step in range(proof_count(40, 400)):
        if len(running) < 4:
            name = rng.choice([None, *ADAPTERS])
            needs = [setting.loaded[name].version] if name else []
            if table.pin(needs) is not None:
                running[step] = (name, needs, [])
        for slot, version in table.take_loads():
            store.load(slot, setting.loaded[versions[version]])
        work = [(s, random_ids(1000 * step + s, rng.randrange(1, 6))) for s in running]
        slots = {versions[version]: slot for version, slot in table.resident.items()}
        names = {s: name for s, (name, _, _) in running.items()}
        lora = LoraBatch.build(rows_of(work, names, slots), store.table, CPU)
        logits = run.step(work, lora=lora)
        for (s, tokens), row in zip(work, logits, strict=True):
            name, needs, so_far = running[s]
            so_far += tokens
            if rng.random() < 0.3:
                assert relative_error(row, setting.expected(name, so_far)[-1]) < ORACLE, (step, name)
                checked += 1
                table.unpin(needs)
                del running[s]
        table.check()
    assert checked > 20
    assert table.num_evictions > 5


def test_several_adapters_on_one_row(setting):
    """A weighted mixture, negative and zero weights too, is the base with the weighted sum of deltas in its weights."""
    ids = random_ids(7, 25)
    weights = {"small": 0.7, "mlp": -0.4, "odd": 0.0, "guanaco": 0.5}
    order = list(weights)
    entries = tuple((slot, weights[name]) for slot, name in enumerate(order))
    lora = LoraBatch.build([entries] * len(ids), setting.store(order).table, CPU)
    ours = PagedRun(setting.model).step([(0, ids)], every_row=True, lora=lora)
    deltas = {}
    for name in ("small", "mlp", "guanaco"):
        for target, pair in setting.loaded[name].pairs.items():
            delta = weights[name] * pair.scale * (pair.b.double() @ pair.a.double())
            deltas[target] = deltas.get(target, 0) + delta
    oracle = setting.oracle.get_base_model()
    layers = {target: oracle.get_submodule(f"model.{target}").get_base_layer() for target in deltas}
    with torch.no_grad():
        for target, delta in deltas.items():
            layers[target].weight += delta.float()
        expected = setting.expected(None, ids)
        for target, delta in deltas.items():
            layers[target].weight -= delta.float()
    assert relative_error(ours, expected) < ORACLE


def test_a_mixture_is_pefts_add_weighted_adapter(setting):
    ids, order = random_ids(8, 30), ["small", "mlp", "guanaco"]
    weights = [0.7, -0.3, 0.4]
    entries = tuple(enumerate(weights))
    lora = LoraBatch.build([entries] * len(ids), setting.store(order).table, CPU)
    ours = PagedRun(setting.model).step([(0, ids)], every_row=True, lora=lora)
    setting.oracle.add_weighted_adapter(order, weights, "mixture", combination_type="cat")
    try:
        expected = setting.expected("mixture", ids)
    finally:
        setting.oracle.delete_adapter("mixture")
    assert relative_error(ours, expected) < ORACLE


def test_watermark_adapters_sign_their_own_rows(setting, tmp_path):
    """The load tests' adapters: greedy text shows whose it is, here with eight of them and the base in one batch."""
    tokens = list(range(300, 308))
    targets = setting.model.lora_targets
    store = SlotStore(targets, len(tokens), CPU)
    with setting.oracle.disable_adapter():
        marks = Watermarks.measure(setting.oracle.get_base_model())
        for slot, token in enumerate(tokens):
            path = marks.make(tmp_path / f"mark{token}", token, rank=1 + slot)
            store.load(slot, load_adapter(path, targets))
    run = PagedRun(setting.model, num_blocks=1000)
    work = [(i, random_ids(50, 6)) for i in range(9)]
    entries = [((i, 1.0),) if i < 8 else () for i in range(9)]
    said = [[] for _ in range(9)]
    for _ in range(24):
        lora = LoraBatch.build([entries[i] for i, new in work for _ in new], store.table, CPU)
        choice = run.step(work, lora=lora).argmax(-1).tolist()
        for i, token in enumerate(choice):
            said[i].append(token)
        work = [(i, [token]) for i, token in enumerate(choice)]
    for i, token in enumerate(tokens):
        assert said[i].count(token) >= 6, (token, said[i])
        assert all(said[other].count(token) <= 2 for other in range(9) if other != i)
        assert len(set(said[i])) >= 4, "the prompt still has a say"
