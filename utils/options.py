"""Every option of training and testing is declared here once, or beside the rule, head or network that it belongs to.

A declaration holds the default, the meaning, the bounds, where the option has an effect, and what a resume and a test
do when its value differs from that of the run. Order of precedence: default < JSON file (``--name_of_args_json_file``)
< command line. Names are those of the official CxGrad and MAML++ programs, because users' scripts and JSON files hold
them.
"""

import argparse
import codecs
import dataclasses
import difflib
import importlib
import logging
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args

from utils import metaoptnet
from utils.errors import UserError
from utils.files import parsed_json
from utils.names import can_name_a_file, canonical_name, same_dataset

log = logging.getLogger(__name__)
T = TypeVar("T")

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = 80
brief = _brief.repr  # how messages show a user's value: what is long loses its middle

# Modules that declare options, rules, heads, networks and trackers; they are imported when options are first used.
PLUGINS = ("inner_loop_optimizers", "classification_heads", "meta_neural_network_architectures", "utils.trackers")

# What happens where a value differs from that of the run: it is an error; it is used, with a warning; it is used; the
# run's value is used, with a warning.
Policy = Literal["refuse", "warn", "ignore", "keep"]
Condition = dict[str, Any]  # option -> the value, or a tuple of the values, that it has to have


@dataclasses.dataclass
class Declaration:
    """What is declared of an option besides its name, type and default."""

    meaning: str
    _: dataclasses.KW_ONLY
    choices: Any = ()  # the values that it may have; may map each to the condition under which it is one; (): any
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # other programs' words -> choices
    at_least: float | None = None
    at_most: float | None = None
    only: Condition = dataclasses.field(default_factory=dict)  # where it has an effect; elsewhere it stays the default
    resume: Policy = "refuse"
    test: Policy = "refuse"
    dry_run: Any = None  # the value that a dry run uses in its place; None: the same value

    def __post_init__(self) -> None:
        conditions = self.choices if isinstance(self.choices, dict) else {choice: {} for choice in self.choices}
        self.choices = {choice: [only] for choice, only in conditions.items()}  # one of the conditions has to hold


def opt(default: T, meaning: str, **more: Any) -> T:
    """Return a dataclass field with the default, and with a `Declaration` of the other arguments as metadata."""
    return dataclasses.field(default=default, metadata={"declared": Declaration(meaning, **more)})


free = partial(opt, resume="ignore", test="ignore")  # where, how long or how a run computes: it may always change
tuned = partial(opt, resume="warn", test="ignore")  # a run may go on with a new value; tests do not depend on it
fixed = partial(opt, test="ignore")  # a run has to keep it; tests do not depend on it

GRADIENT: Condition = {"learner": "gradient"}
HEAD: Condition = {"learner": "head"}
RESNET: Condition = {"backbone": "ResNet-12"}
SEED = {"at_least": 0, "at_most": 2**32 - 1}
SIDE = {"at_least": 1, "at_most": 4096}
WAY = {"at_least": 2, "at_most": 10_000}
FEW = {"at_least": 1, "at_most": 1000}
MOST = 10**9  # of anything that is counted, where nothing else is declared


@dataclasses.dataclass
class Options:
    """These are the options of one run. Construct through `parse_args`, `from_object` or `from_mapping`; all validate.

    The defaults are those of a gradient learner; `utils.metaoptnet` holds what differs with ``learner`` = head. Every
    instance also has the options that `add_options` has added.
    """

    learner: str = opt(
        "gradient",
        "gradient: inner gradient steps (MAML, CxGrad); head: a base learner solved in each task (MetaOptNet), which a "
        "--head without gradient steps' options chooses",
        choices=("gradient", "head"),
    )

    # --- data -------------------------------------------------------------------------------------------------
    dataset_name: str = opt("mini_imagenet", "data set to train on: a folder under dataset_dir, or a built-in one")
    dataset_dir: str = free("datasets", "folder that holds the data sets")
    image_height: int = opt(84, "pixels; images are resized to it", **SIDE)
    image_width: int = opt(84, "pixels; images are resized to it", **SIDE)
    image_channels: int = opt(3, "3 = RGB, 1 = grey", choices=(1, 3))
    normalization: str = opt(
        "unit",
        "unit: pixels scaled to [0, 1]; channel: then each channel shifted and scaled by the train split's statistics; "
        "published: by MetaOptNet's for this data set",
        choices=("unit", "channel", "published"),
        test="keep",
    )
    augment: bool = fixed(False, "training images are cropped, colour-jittered and flipped at random, as MetaOptNet's")
    skip_bad_images: bool = opt(False, "leave out images that cannot be read, with a warning", test="warn")
    num_dataprovider_workers: int | None = free(None, "processes to decode images; default: all cores", at_least=1)

    # --- tasks ------------------------------------------------------------------------------------------------
    num_classes_per_set: int = opt(5, "way: classes in a task", **WAY, test="warn")
    num_samples_per_class: int = opt(1, "shot: support images per class", at_least=1, test="warn")
    num_target_samples: int = fixed(15, "query: query images per class", at_least=1, dry_run=1)
    test_way: int | None = fixed(None, "way in validation and test, with a head; default: as in training", **WAY)
    val_shot: int | None = fixed(None, "shot in validation and test; default: as in training", at_least=1)
    val_query: int | None = fixed(None, "query in validation and test; default: as in training", at_least=1, dry_run=1)
    test_shots: str | None = free(None, "shots to meta-test with, such as 1,5; default: that of validation")
    batch_size: int = fixed(4, "tasks in a training meta-batch, over all devices together", at_least=1)
    test_batch_size: int | None = free(None, "tasks in an evaluation meta-batch; default: batch_size", at_least=1)
    tasks_per_pass: int | None = free(
        None,
        "tasks per pass; default in training: the fastest by a measurement at the start, else on a GPU all, else 1",
        at_least=1,
        only=GRADIENT,
    )
    cuda_graph: str = free(
        "auto",
        "auto: a GPU replays the gradients of a meta-batch from a CUDA graph where it can; off: never",
        choices=("auto", "off"),
        only=GRADIENT,
    )
    checkpoint_inner_steps: bool = free(False, "store less, compute inner steps twice; same gradients", only=GRADIENT)
    rotate_classes: bool | None = fixed(None, "training turns classes into new ones too; default: on for omniglot")
    train_seed: int = fixed(0, "seed of the stream of training tasks", **SEED)
    val_seed: int = fixed(0, "seed of the (separate) streams of validation and test tasks", **SEED)

    # --- network ----------------------------------------------------------------------------------------------
    backbone: str = opt("4-CONV", "network; a gradient learner adapts it, a head learner embeds images with it")
    resnet_widths: str = opt("64-128-256-512", "channels of ResNet-12's blocks", only=RESNET, dry_run="2-3-4-5")
    avg_pool: bool = opt(False, "ResNet-12 averages its last map", only=HEAD | RESNET)
    dropblock_schedule: str = fixed(
        "official",
        "training: ResNet-12's DropBlock grows with forward passes in training; official: in evaluation too",
        choices=("training", "official"),
        only=HEAD | RESNET,
    )
    cnn_num_filters: int = opt(48, "filters of every convolution", at_least=1, at_most=4096, only=GRADIENT, dry_run=4)
    num_stages: int = opt(4, "convolution blocks", **FEW, only=GRADIENT)
    conv_padding: bool = opt(True, "pad convolutions by one pixel", only=GRADIENT)
    max_pooling: bool = opt(True, "2x2 max-pooling; off: stride 2 and a global average pool", only=GRADIENT)
    use_bias: bool | None = opt(None, "4-CONV: biases; default: as official, on with ALFA and L2F", only=GRADIENT)
    norm_layer: str = opt("batch_norm", "normalisation after each convolution", choices=("batch_norm",))
    batch_norm: str = opt(
        "transductive",
        "what normalises images in evaluation. transductive: their own statistics; per_step, running: those "
        "accumulated in training, for each inner step or for all",
        choices={"transductive": GRADIENT, "per_step": GRADIENT, "running": {}},
        test="warn",
    )
    per_step_bn_statistics: bool = opt(False, "batch-norm weights and statistics of each step's own", only=GRADIENT)
    learnable_bn_gamma: bool = opt(True, "train the batch norm's scale", only=GRADIENT)
    learnable_bn_beta: bool = opt(True, "train the batch norm's shift", only=GRADIENT)

    # --- inner loop -------------------------------------------------------------------------------------------
    number_of_training_steps_per_iter: int = opt(
        5, "inner steps in training", **FEW, only=GRADIENT, test="warn", dry_run=2
    )
    number_of_evaluation_steps_per_iter: int = fixed(5, "inner steps in evaluation", **FEW, only=GRADIENT, dry_run=2)
    init_inner_loop_learning_rate: float = opt(
        0.01, "inner learning rate (initial value where it is learned)", at_least=0, only=GRADIENT, test="warn"
    )
    enable_inner_loop_optimizable_bn_params: bool = opt(False, "inner steps move batch norm too", only=GRADIENT)

    # --- head -------------------------------------------------------------------------------------------------
    head: str | None = opt(None, "base learner on embeddings; default with --learner head: ProtoNet", test="warn")

    # --- outer loop -------------------------------------------------------------------------------------------
    second_order: bool = fixed(True, "differentiate through the inner gradients", only=GRADIENT)
    first_order_to_second_order_epoch: int = tuned(-1, "second order only in epochs after this one", only=GRADIENT)
    use_multi_step_loss_optimization: bool = fixed(False, "MSL (MAML++): all steps' query losses", only=GRADIENT)
    multi_step_loss_num_epochs: int = tuned(15, "MSL: epochs until only the last counts", at_least=1, only=GRADIENT)
    meta_learning_rate: float = tuned(0.001, "learning rate at the start, of Adam; head: of SGD", at_least=0)
    min_learning_rate: float = tuned(0.001, "learning rate at the cosine schedule's end", at_least=0, only=GRADIENT)
    outer_weight_decay: float = fixed(0.0, "SGD's decay of every parameter", at_least=0, only=HEAD)
    label_smoothing: float = tuned(0.0, "part of a training target that the other classes share", at_least=0, only=HEAD)
    precision: str = tuned(
        "float32",
        "arithmetic of the embedding. tf32: convolutions and products on a GPU in TF32; bf16: autocast to it",
        choices=("float32", "tf32", "bf16"),
        only=HEAD,
    )
    clamp_outer_gradients: float = tuned(
        0.0, "limit of each entry of the network's outer gradient (MAML++: 10); 0: none", at_least=0, only=GRADIENT
    )
    on_nonfinite: str = tuned(
        "stop",
        "what happens where a pixel, loss or gradient is not finite, or a head is not solved. stop: the run ends; "
        "skip: the iteration is left out, and answers to validation and test tasks that are not finite count as "
        "guesses; the host then waits for the GPU in every iteration",
        choices=("stop", "skip"),
    )
    max_skipped: int = free(
        10, "iterations that a run may leave out before it ends", at_least=0, only={"on_nonfinite": "skip"}
    )
    lr_schedule: str | None = tuned(
        None,
        "cosine stepped per_epoch (MAML++) or per_iteration with total_epochs iterations as half period, as the "
        "official CxGrad program does; default: per_iteration with contextual_grad, else per_epoch. head: steps: times "
        "0.06, 0.012, 0.0024 after 20, 40, 50 epochs; steps_official: one epoch early, as the official program",
        choices={"per_epoch": GRADIENT, "per_iteration": GRADIENT, "steps": HEAD, "steps_official": HEAD},
    )

    # --- experiment -------------------------------------------------------------------------------------------
    experiment_name: str = free(
        "experiment", "results go to EXPERIMENTS_DIR/DATASET_Nway_Kshot/NAME (of heads DATASET_Nway/NAME)"
    )
    experiments_dir: str = free("experiments", "folder that holds all results")
    save_path: str | None = free(None, "folder of results instead; its checkpoints lie directly in it")
    seed: int = fixed(104, "seed of the initial weights", **SEED)
    num_seeds: int = free(
        1, "runs from seed and train_seed up, one after the other, in NAME/seed_1, …; then mean and spread", **FEW
    )
    total_epochs: int = free(100, "epochs; each ends with a validation and a checkpoint", at_least=1, dry_run=2)
    total_iter_per_epoch: int = fixed(500, "training iterations in an epoch", at_least=1, dry_run=1)
    num_evaluation_tasks: int = fixed(600, "tasks to score; one task has no confidence interval", at_least=2, dry_run=2)
    max_models_to_save: int = free(5, "epoch checkpoints kept: the best by validation accuracy", at_least=1)
    save_epoch: int = free(0, "keep the checkpoint of every so many epochs as well; 0: of none", at_least=0)
    top_n_models: int = free(5, "checkpoints whose logits the ensemble test averages", at_least=1)
    continue_from_epoch: str = free(
        "latest", "latest; from_scratch or a kept epoch's number hold each time the command runs", dry_run="latest"
    )
    evaluate_on_test_set_only: bool = free(False, "no training: meta-test this experiment's checkpoints", dry_run=False)
    test_datasets: str | None = free(None, "data sets to meta-test on, such as CUB,glyphs; default: dataset_name")
    tracker: str = free("none", "where curves go besides the logs", choices=("none",))
    gpu: str | None = free(None, "GPU ids such as 0 or 0,1, or cpu; default: the first GPU if there is one, else cpu")
    deterministic: bool = free(
        False, "a GPU computes the same bits every time, more slowly; then a resumed run equals one never stopped"
    )
    dry_run: bool = free(False, "two tiny iterations of everything on made-up images, in a folder that is then removed")
    name_of_args_json_file: str | None = free(None, "JSON file of options; the command line wins over it")

    def __new__(cls, *_: Any, **__: Any) -> "Options":
        """Return an instance that has the options of the plug-ins too, whichever class it is asked of."""
        load_plugins()
        return object.__new__(_current)

    @classmethod
    def from_object(cls, source: object) -> "Options":
        """Return options from an object's attributes; missing ones take the defaults, other attributes are ignored.

        So are those that have no effect in the official JSON files, from which the official programs' objects are made.
        """
        names = [name for name in all_defaults() if hasattr(source, name) and name not in DEAD_KEYS]
        return cls.from_mapping({name: getattr(source, name) for name in names})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "options", saved: bool = False) -> "Options":
        """Return options from values or their text; raises UserError for an unknown name or a bad value.

        With `saved` they are those of a run, so one without an effect may be an earlier default: it is today's then.
        """
        values = {ALIASES.get(name, name): value for name, value in values.items()}
        check_names(values, all_defaults(), f"{origin}: ")
        values = converted(values)
        if values.get("learner") == "head":
            values = metaoptnet.defaults(values) | values
        options = cls(**values)
        if saved:
            return changed(options, {})
        options.validate()
        return options

    def validate(self) -> None:
        """Raise UserError where values are out of bounds, have no effect or contradict one another."""
        for check in _checks:
            for problem in check(self):
                raise UserError(problem)

    @property
    def training_task(self) -> tuple[int, int, int]:
        """Return (way, shot, query) in training."""
        return self.num_classes_per_set, self.num_samples_per_class, self.num_target_samples

    @property
    def evaluation_task(self) -> tuple[int, int, int]:
        """Return (way, shot, query) in validation and test."""
        way, shot, query = self.training_task
        return self.test_way or way, self.val_shot or shot, self.val_query or query

    @property
    def test_dataset_list(self) -> list[str]:
        return [name.strip() for name in (self.test_datasets or self.dataset_name).split(",")]

    @property
    def test_shot_list(self) -> list[int]:
        return [int(shot) for shot in self.test_shots.split(",")] if self.test_shots else [self.evaluation_task[1]]

    @property
    def tracks_statistics(self) -> bool:
        """Return whether training keeps running statistics of batch norm."""
        return self.per_step_bn_statistics or self.batch_norm == "running"

    @property
    def resnet_width_list(self) -> list[int]:
        return [int(width) for width in self.resnet_widths.split("-")]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width)."""
        return self.image_channels, self.image_height, self.image_width

    @property
    def evaluation_batch_size(self) -> int:
        return self.test_batch_size or self.batch_size


# --- declarations are looked up, extended and checked ---------------------------------------------------------------

_current: type[Options] = Options  # with the options of all plug-ins so far
_checks: list[Callable[[Options], Iterable[str]]] = []
_pending = [*PLUGINS]


def load_plugins() -> None:
    """Import the modules that declare rules, heads and networks; later calls do nothing."""
    while _pending:
        name = _pending.pop(0)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise UserError(f"PLUGINS in utils/options.py names {name!r}, and there is no file {name}.py") from error


def all_defaults(learner: str = "gradient") -> dict[str, Any]:
    """Return the default with this learner of every option, those of plug-ins included."""
    load_plugins()
    usual = {field.name: field.default for field in dataclasses.fields(_current)}
    return usual | (metaoptnet.DEFAULTS if learner == "head" else {})


def declaration(name: str) -> Declaration:
    """Return what is declared of the option `name`."""
    declared: Declaration = _current.__dataclass_fields__[name].metadata["declared"]
    return declared


def is_option(name: str) -> bool:
    """Return whether an option of this name has been declared so far."""
    return name in _current.__dataclass_fields__


def add_options(mixin: type[T]) -> type[T]:
    """Make the `opt` fields of a class options of every `Options` made from now on; a decorator.

    The class extends `Options`, so that a type checker knows all of a rule's options by it. Raises ValueError if one of
    its fields is an option already, or is not made by `opt`.
    """
    global _current
    mixin = dataclasses.dataclass(mixin)
    fields: dict[str, dataclasses.Field[Any]] = mixin.__dict__["__dataclass_fields__"]
    if bare := [name for name, field in fields.items() if "declared" not in field.metadata]:
        raise ValueError(f"{mixin.__name__} has to declare with opt: {', '.join(bare)}")
    if twice := [name for name in mixin.__annotations__ if is_option(name)]:
        raise ValueError(f"{mixin.__name__} declares what is an option already: {', '.join(twice)}")
    _current = dataclasses.make_dataclass("Options", [], bases=(mixin, _current))
    return mixin


def add_choice(option: str, name: str, *, aliases: Sequence[str] = (), only: Condition | None = None) -> None:
    """Make `name`, and other programs' `aliases` of it, a value that an option may have where `only` holds.

    A choice that is added twice is one where either condition holds.
    """
    declared = declaration(option)
    declared.choices.setdefault(name, []).append(only or {})
    declared.aliases.update(dict.fromkeys(aliases, name))


def add_plug_in(registry: dict[str, T], name: str, plug_in: T) -> None:
    """Put a rule, head or network into its registry; raises ValueError if there is one of that name."""
    if name in registry:
        raise ValueError(f"there is a {name} already; give the new one another name")
    registry[name] = plug_in


def add_check(check: Callable[[Options], Iterable[str]]) -> Callable[[Options], Iterable[str]]:
    """Make `check`, which yields a sentence for each contradiction, part of `Options.validate`; a decorator."""
    _checks.append(check)
    return check


def unmet(condition: Condition, options: Options) -> str | None:
    """Return the first option in `condition` that has none of the values named there; None if the condition holds."""
    for name, wanted in condition.items():
        if getattr(options, name) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return name
    return None


def allowed(declared: Declaration, options: Options) -> list[Any]:
    """Return the choices whose conditions hold."""
    return [choice for choice, any_of in declared.choices.items() if None in {unmet(only, options) for only in any_of}]


@add_check
def _declared(options: Options) -> Iterator[str]:
    """Yield what is not among the choices, is out of bounds, or was set where it has no effect."""
    for name, usual in all_defaults(options.learner).items():
        value, declared = getattr(options, name), declaration(name)
        if value is None:
            continue
        if declared.choices and value not in (among := allowed(declared, options)):
            keys = {key: None for any_of in declared.choices.values() for only in any_of for key in only}
            where = "with " + " ".join(f"--{key} {getattr(options, key)}" for key in keys) + " " if keys else ""
            yield f"--{name} is {brief(value)}; {where}it is one of {', '.join(map(str, among))}"
        if isinstance(value, str) and not can_name_a_file(value):
            yield f"--{name} is {brief(value)}; it takes text that can stand in the name of a file"
        low, most = declared.at_least, declared.at_most
        high = most or (sys.float_info.max if isinstance(value, float) else MOST)
        if low is not None and not low <= value <= high:
            bounds = f"a number from {low:g} up" if isinstance(value, float) else f"at least {low:g}"
            bounds = f"from {low} to {high}" if most or (isinstance(value, int) and value > high) else bounds
            yield f"--{name} is {brief(value)}; it must be {bounds} ({declared.meaning})"
        if value != usual and (key := unmet(declared.only, options)):
            wanted = declared.only[key]
            words = " or ".join(map(str, wanted if isinstance(wanted, tuple) else [wanted])).replace("True", "true")
            yield f"--{name} has no effect with --{key} {getattr(options, key)}; it needs --{key} {words}"


@add_check
def _contradictions(options: Options) -> Iterator[str]:
    """Yield the contradictions among options of training in general."""
    names = [canonical_name(name) for name in options.test_dataset_list]
    if "" in names or len(set(names)) < len(names):
        yield f"--test_datasets is {brief(options.test_datasets)}; it takes different names such as CUB,glyphs"
    if not _are_counts((options.test_shots or "1").split(",")):
        yield f"--test_shots is {brief(options.test_shots)}; it takes numbers such as 1,5"
    if (top := options.top_n_models) > (kept := options.max_models_to_save):
        yield f"--top_n_models {top} needs more checkpoints than --max_models_to_save {kept} keeps; lower the former"
    if options.continue_from_epoch not in ("latest", "from_scratch") and not options.continue_from_epoch.isdecimal():
        yield f"--continue_from_epoch is {brief(options.continue_from_epoch)}: latest, from_scratch or a number"
    if (least := options.min_learning_rate) > (most := options.meta_learning_rate):
        yield f"--min_learning_rate {least:g} is above --meta_learning_rate {most:g}, from which the schedule goes down"
    channels, statistics = options.image_channels, metaoptnet.published_statistics(options.dataset_name) or [()]
    if options.normalization == "published" and channels != len(statistics[0]):
        data = f"{options.dataset_name} in {channels} channels"
        yield f"no pixel statistics of {data} are published; use --normalization channel"
    widths, four = options.resnet_widths.split("-"), options.learner == "head"
    if not _are_counts(widths) or (four and len(widths) != 4):
        count = "four numbers" if four else "numbers"
        yield f"--resnet_widths is {brief(options.resnet_widths)}; it takes {count} such as 64-128-256-512"
    if options.per_step_bn_statistics and options.batch_norm == "running":
        yield "--batch_norm running cannot use --per_step_bn_statistics, a set per step; choose --batch_norm per_step"
    if options.batch_norm == "per_step" and not options.per_step_bn_statistics:
        yield "--batch_norm per_step needs the statistics that training keeps with --per_step_bn_statistics true"


def _are_counts(words: Sequence[str]) -> bool:
    """Return whether all are numbers from 1 to 9999."""
    return all(re.fullmatch(r"[0-9]{1,4}", word) and int(word) for word in words)


@add_check
def _contradictions_of_heads(options: Options) -> Iterator[str]:
    """Yield the contradictions that concern heads and the tasks that they solve."""
    heads, way = options.learner == "head", options.num_classes_per_set
    if options.head and not heads and not options.evaluate_on_test_set_only:
        yield (
            "a network trained by gradient steps is tested with a --head, not trained with one; to train with a head, "
            "say --learner head and leave out options of inner steps"
        )
    if heads and options.head is None:
        yield f"--learner head needs a --head: {', '.join(declaration('head').choices)}"
    if heads and options.lr_schedule is None:
        yield f"--learner head needs an --lr_schedule: {' or '.join(allowed(declaration('lr_schedule'), options))}"
    if options.head is None and options.test_way not in (None, way):
        other = f"it cannot be tested with {options.test_way}; a head can: --head Ridge, for example"
        yield f"the network classifies {way} ways with a linear layer, so {other}"
    if not options.label_smoothing <= (way - 1) / way:
        yield f"--label_smoothing is {options.label_smoothing}; with {way} ways it is from 0 to {(way - 1) / way:g}"


# --- what a resume and a test may change ----------------------------------------------------------------------------


class Difference(NamedTuple):
    """An option whose value is not that of the run, and what its declaration says of that."""

    name: str
    before: Any
    now: Any
    policy: Policy

    def __str__(self) -> str:
        return f"--{self.name} is {self.now}, but the run was started with {self.before}"


def differences(before: Mapping[str, Any], now: Options, purpose: Literal["resume", "test"]) -> list[Difference]:
    """Return what `now` has otherwise than the saved options of a run, less what is to be ignored or has no effect.

    An option that is not among the saved ones, because the run is older than it, counts as its default.
    """
    before = all_defaults(before.get("learner", now.learner)) | dict(before)
    found = []
    for name, value in dataclasses.asdict(now).items():
        policy: Policy = getattr(declaration(name), purpose)
        same = before[name] == value or (name == "dataset_name" and same_dataset(str(before[name]), value))
        if not same and policy != "ignore" and not unmet(declaration(name).only, now):
            found.append(Difference(name, before[name], value, policy))
    return found


def changed(options: Options, changes: Mapping[str, Any]) -> Options:
    """Return the options with `changes`; those that then have no effect, and are not among these, get their defaults.

    Raises UserError as `Options.validate` does.
    """
    new = dataclasses.replace(options, **changes)
    for name, usual in all_defaults(new.learner).items():
        if name not in changes and unmet(declaration(name).only, new):
            setattr(new, name, usual)
    new.validate()
    return new


# --- command line and files -----------------------------------------------------------------------------------------

# Other names of options: MetaOptNet's, and one of our own earlier ones. On the command line '-' is as good as '_'.
ALIASES = metaoptnet.FLAGS | {"test_dataset": "test_datasets"}


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Return the options of a command line (default: this process's); raises UserError for what is not right."""
    values = parse(command_line_parser(), argv)
    file = values.get("name_of_args_json_file")
    values = (read_json(Path(file)) if file not in (None, "None") else {}) | values
    network = converted({"backbone": values.get("backbone", "ResNet-12")})["backbone"]
    of_gradient = declaration("backbone").choices.get(network) == [GRADIENT]
    of_gradient |= any(declaration(ALIASES.get(name, name)).only == GRADIENT for name in values)
    if values.get("head") not in (None, "None") and not of_gradient:
        values.setdefault("learner", "head")
    return Options.from_mapping(values)


def command_line_parser() -> argparse.ArgumentParser:
    """Return the parser of training's command line."""
    defaults = all_defaults()
    return parser_of({name: name for name in defaults} | ALIASES, defaults)


class _Parser(argparse.ArgumentParser):
    """This parser leaves it to the entry to say what is wrong, without a hundred lines of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all)")


def parser_of(flags: Mapping[str, str], defaults: Mapping[str, Any], description: str = "") -> argparse.ArgumentParser:
    """Return a parser of the options that `flags` names (flag -> option); `defaults` are those that its help shows."""
    parser = _Parser(
        description=f"{description}\nOptions take a value; booleans are true or false, and true without a value.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for option in dict.fromkeys(flags.values()):
        names = [name for name in flags if flags[name] == option]
        spelt = [f"--{name}" for name in names] + [f"--{name.replace('_', '-')}" for name in names if "_" in name]
        declared, kind = declaration(option), _base_type(_current.__dataclass_fields__[option])
        other = "".join(f"; {alias} is {choice}" for alias, choice in declared.aliases.items())
        parser.add_argument(
            *spelt,
            dest=option,
            help=f"{declared.meaning}{other} [{defaults[option]}]".replace("%", "%%"),
            metavar="|".join(map(str, declared.choices)) or kind.__name__.upper(),
            nargs="?" if kind is bool else None,
            const="true" if kind is bool else None,
        )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the options on a command line, as text; raises UserError for names that the parser does not know."""
    values, rest = parser.parse_known_args(argv)
    if rest:
        words = [word.split("=")[0] for word in rest if word.startswith("--")]
        check_names(words, [word for action in parser._actions for word in action.option_strings], "")
        raise UserError(f"{brief(rest[0])} belongs to no option (--help lists all)")
    return vars(values)


def by_own_names(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object by the options' own names, with a warning of those that are set twice."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        own = ALIASES.get(name, name)
        if own in values and values[own] != value:
            log.warning("'%s' is set twice, to %s and to %s; the latter counts", own, brief(values[own]), brief(value))
        values[own] = value
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the options in a JSON file; raises UserError naming the file and what is wrong with it."""
    try:
        values = parsed_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), object_pairs_hook=by_own_names)
    except OSError as error:
        raise UserError(f"cannot read the options file {path}: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object of option names and values")
    check_names(values, [*all_defaults(), *DEAD_KEYS], f"{path}: ")
    for name in values.keys() & DEAD_KEYS.keys():
        log.warning("%s: '%s' has no effect: %s", path, name, DEAD_KEYS[name])
    return {name: value for name, value in values.items() if name not in DEAD_KEYS}


# Keys of the official JSON files that decide nothing here, by the reason.
_NO_EFFECT = """
the official programs never read it: cnn_blocks_per_stage cnn_num_blocks weight_decay dropout_rate_value meta_opt_bn
    learnable_batch_norm_momentum minimum_per_task_contribution evalute_on_test_set_only train_in_stages
    total_unique_tasks;
--gpu says where to compute: gpu_to_use num_of_gpus use_cuda use_gpu;
data sets are class folders by split: dataset_path sets_are_pre_split train_val_test_split labels_as_int
    indexes_of_folders_indicating_class;
images are cached by themselves: reset_stored_paths load_from_npz_files load_into_memory;
it has no counterpart: use_gdrive reverse_channels architecture_name total_epochs_before_pause;
--rotate_classes says whether training turns classes: augment_images;
--batch_size counts the tasks of a meta-batch: samples_per_iter;
--init_inner_loop_learning_rate is the inner rate, though MAML++'s own program takes this key's: task_learning_rate;
a file cannot say where a run stands, the command line can: continue_from_epoch
"""
_REASONS = [entry.strip().split(": ") for entry in _NO_EFFECT.split(";")]
DEAD_KEYS = {name: reason for reason, names in _REASONS for name in names.split()}


def check_names(names: Iterable[str], known: Collection[str], origin: str) -> None:
    """Raise UserError for the names that are no known ones, with the nearest that are."""
    problems = []
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            problems.append(
                f"there is no option {brief(name)}" + "".join(f"; did you mean '{near}'?" for near in nearest)
            )
    if problems:
        raise UserError(f"{origin}{'; '.join(problems)} (--help lists all)")


def _base_type(field: "dataclasses.Field[Any]") -> type:
    """Return the type of a field, without the None of an optional one."""
    kinds: tuple[Any, ...] = get_args(field.type) or (field.type,)  # (type, NoneType) of an optional one
    return kinds[0]


def converted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options' values or their text as the options' types."""
    return {name: _convert(_current.__dataclass_fields__[name], value) for name, value in values.items()}


def _convert(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Return a value or its text as the field's type; raises UserError naming the option and what it takes."""
    kind, declared = _base_type(field), field.metadata["declared"]
    if value in (None, "None") and field.default is None:
        return None
    if value is None:
        raise UserError(f"--{field.name} needs a value ({kind.__name__})")
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, (bool, list, dict)) or (kind is int and float(value) % 1):  # of inf it is nan, so true
            raise ValueError(value)
        converted = kind(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--{field.name} is {brief(value)}; it takes {_EXPECTED[kind]}") from error
    spelt = {_folded(choice): choice for choice in declared.choices}
    spelt |= {_folded(alias): choice for alias, choice in declared.aliases.items()}
    return spelt.get(_folded(converted), converted)


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _folded(choice: object) -> str:
    """Return a spelling that 4-CONV, 4conv and 4_conv share."""
    return str(choice).lower().replace("-", "").replace("_", "")
