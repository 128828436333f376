"""Recipes: all hyperparameters of a training, as one frozen value. Knows no data and no libraries.

Used by `job`. The server's jobs compute from it how many steps a training will have."""

from dataclasses import dataclass, replace
from typing import Any

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECIPES = ("default", "guanaco-2023")
SCHEDULES = ("cosine", "constant")
_BILLION = 10**9
_MIN_ROWS_FOR_SPLIT = 10


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training. A step changes the adapter's weights once, from `batch_size` sequences."""

    name: str = "default"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ALL_LINEAR
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    epochs: float = 3.0
    steps: int | None = None  # used instead of epochs; None: epochs count
    batch_size: int = 4
    micro_batch: int = 4  # sequences that are computed together; the gradients of a batch are accumulated
    max_length: int = 1024  # most tokens of a sequence
    max_grad_norm: float = 1.0
    beta2: float = 0.999
    weight_decay: float = 0.0
    eval_every: int | None = None  # steps; None: ten times in a training, and at least every 250 steps
    save_every: int | None = None  # steps; None: as often as it evaluates
    patience: int = 3  # evaluations without an improvement after which training stops; 0: it never stops early
    keeps_best: bool = True  # True: the adapter is the checkpoint with the lowest held-out loss; False: the last
    train_on: str = "answers"
    group_by_length: bool = True
    gradient_checkpointing: bool = False
    held_out: float = 0.1  # share of the rows that measure the loss and are not trained on
    max_held_out: int | None = 200  # most rows that are held out; None: no limit
    paged_optimizer: bool = False  # used on a GPU only; a CPU uses torch's AdamW
    seed: int = 0
    data_seed: int = 0  # decides which rows are held out, and the order of training

    def public(self) -> dict[str, Any]:
        """Its fields as plain data."""
        return {**vars(self), "targets": list(self.targets)}

    @property
    def accumulation(self) -> int:
        """Micro batches of one step."""
        return -(-self.batch_size // self.micro_batch)


def num_held_out(num_rows: int, share: float, most: int | None) -> int:
    """How many of `num_rows` rows are held out. A file of fewer than ten rows is trained on whole."""
    number = int(num_rows * share) if num_rows >= _MIN_ROWS_FOR_SPLIT else 0
    return number if most is None else min(number, most)


def default_learning_rate(num_parameters: int) -> float:
    """The learning rate of the default recipe for a base of this size. Small bases need a larger one."""
    return 1e-3 if num_parameters < _BILLION else 2e-4


def recipe_for(name: str, num_parameters: int, given: dict[str, Any]) -> Recipe:
    """The recipe called `name` for a base of this size, with the fields that the operator has given.

    given: `seed` is also the data's seed, `epochs` replaces the recipe's steps, and in the default recipe `rank` makes
    alpha twice the rank. The micro batch is lowered until it divides the batch.
    """
    recipe = _guanaco_2023(num_parameters) if name == "guanaco-2023" else _default(num_parameters)
    if "seed" in given:
        given = {"data_seed": given["seed"], **given}
    if "epochs" in given:
        given = {"steps": None, **given}
    if "rank" in given and "alpha" not in given and name == "default":
        given = {"alpha": 2 * given["rank"], **given}
    recipe = replace(recipe, **given)
    micro = min(recipe.micro_batch, recipe.batch_size)
    while recipe.batch_size % micro:
        micro -= 1
    return replace(recipe, micro_batch=micro)


def _default(num_parameters: int) -> Recipe:
    is_large = num_parameters >= _BILLION
    return Recipe(learning_rate=default_learning_rate(num_parameters), gradient_checkpointing=is_large)


def _guanaco_2023(num_parameters: int) -> Recipe:
    """The hyperparameters that were released with the Guanaco models (scripts of artidoro/qlora), for the nearest of
    their four sizes.

    The scripts state a warm-up ratio, but they ask for a constant schedule, which has no warm-up.
    """
    small = num_parameters < 20 * _BILLION
    return Recipe(
        name="guanaco-2023",
        rank=64,
        alpha=16,
        dropout=0.1 if num_parameters < 10 * _BILLION else 0.05,
        learning_rate=2e-4 if small else 1e-4,
        schedule="constant",
        warmup=0.0,
        steps=1875,
        batch_size=16,
        micro_batch=1,
        max_length=512 + 1,  # BOS, and a target of 512 tokens
        max_grad_norm=0.3,
        eval_every=187,
        save_every=500 if small else 200,
        patience=0,
        keeps_best=False,
        train_on="all",
        gradient_checkpointing=True,
        held_out=0.1,
        max_held_out=1024,
        paged_optimizer=True,
        data_seed=42,
    )
