"""Every option of training and testing: one typed field each, with its meaning and default.

Order of precedence: default < JSON file (``--name_of_args_json_file``) < command line.
Names are those of the official CxGrad and MAML++ programs, because users' scripts and JSON files hold them.
"""

import argparse
import dataclasses
import difflib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from utils.errors import UserError
from utils.names import canonical_name

log = logging.getLogger(__name__)
T = TypeVar("T")


def opt(default: T, meaning: str, choices: Sequence[str] = ()) -> T:
    """A dataclass field that carries its meaning, which the command line's help prints."""
    return dataclasses.field(default=default, metadata={"help": meaning, "choices": choices})


@dataclasses.dataclass
class Options:
    """Resolved options of one run. Construct through `parse_args` or `from_object`; both validate."""

    # --- data -------------------------------------------------------------------------------------------------
    dataset_name: str = opt("mini_imagenet", "data set to train on: a folder under dataset_dir, or a built-in one")
    dataset_dir: str = opt("datasets", "folder that holds the data sets")
    image_height: int = opt(84, "pixels; images are resized to it")
    image_width: int = opt(84, "pixels; images are resized to it")
    image_channels: int = opt(3, "3 = RGB, 1 = grey")
    normalization: str = opt(
        "unit",
        "unit: pixels scaled to [0, 1]; channel: then each channel shifted and scaled by the train split's statistics",
        ("unit", "channel"),
    )
    skip_bad_images: bool = opt(False, "leave out images that cannot be read, with a warning, instead of stopping")
    num_dataprovider_workers: int | None = opt(
        None, "processes that decode a data set's images once; default: all cores"
    )

    # --- tasks ------------------------------------------------------------------------------------------------
    num_classes_per_set: int = opt(5, "way: classes in a task")
    num_samples_per_class: int = opt(1, "shot: support images per class")
    num_target_samples: int = opt(15, "query images per class")
    batch_size: int = opt(4, "tasks in a training meta-batch, over all devices together")
    test_batch_size: int | None = opt(None, "tasks in a validation or test meta-batch; default: batch_size")
    tasks_per_pass: int | None = opt(
        None, "tasks computed in one vectorised pass, same gradients; default: all on a GPU, one on a CPU"
    )
    checkpoint_inner_steps: bool = opt(False, "store less, compute inner steps twice; same gradients")
    rotate_classes: bool | None = opt(
        None, "training turns each class by 0 to 3 quarters, which makes new classes; default: on for omniglot"
    )
    train_seed: int = opt(0, "seed of the stream of training tasks")
    val_seed: int = opt(0, "seed of the (separate) streams of validation and test tasks")

    # --- network ----------------------------------------------------------------------------------------------
    backbone: str = opt("4-CONV", "network that adapts", ("4-CONV", "ResNet-12"))
    resnet_widths: str = opt("64-128-256-512", "ResNet-12: channels of its blocks")
    cnn_num_filters: int = opt(48, "filters of every convolution")
    num_stages: int = opt(4, "convolution blocks")
    conv_padding: bool = opt(True, "pad convolutions by one pixel")
    max_pooling: bool = opt(True, "2x2 max-pooling; off: convolutions of stride 2 and a global average pool")
    use_bias: bool | None = opt(None, "4-CONV: biases in the convolutions; default: as official, on with ALFA and L2F")
    norm_layer: str = opt("batch_norm", "normalisation after each convolution", ("batch_norm",))
    batch_norm: str = opt(
        "transductive",
        "what normalises images in evaluation. transductive: their own statistics; per_step, running: those "
        "accumulated in training, for each inner step or for all",
        ("transductive", "per_step", "running"),
    )
    per_step_bn_statistics: bool = opt(False, "batch-norm weights and running statistics of their own for each step")
    learnable_bn_gamma: bool = opt(True, "train the batch norm's scale")
    learnable_bn_beta: bool = opt(True, "train the batch norm's shift")

    # --- inner loop -------------------------------------------------------------------------------------------
    number_of_training_steps_per_iter: int = opt(5, "inner steps in training")
    number_of_evaluation_steps_per_iter: int = opt(5, "inner steps in validation and test")
    init_inner_loop_learning_rate: float = opt(0.01, "inner learning rate (initial value where it is learned)")
    inner_loop_part: str = opt("all", "what inner steps move: all; head (ANIL); body (BOIL)", ("all", "head", "body"))
    learnable_per_layer_per_step_inner_loop_learning_rate: bool = opt(
        False, "LSLR (MAML++): learn one inner rate per tensor and step"
    )
    meta_sgd: bool = opt(False, "Meta-SGD: learn one inner rate per weight")
    alfa: bool = opt(False, "ALFA: generate inner rates and decays from the task's weights and gradients")
    random_init: bool = opt(False, "ALFA: keep the network's random initialisation, train only the rates")
    init_inner_loop_weight_decay: float = opt(0.0005, "ALFA: decay relative to the inner rate at the start")
    attenuate: bool = opt(False, "L2F: attenuate the initial weights by the task's first gradients")
    enable_inner_loop_optimizable_bn_params: bool = opt(False, "inner steps move the batch norm's scale and shift too")
    contextual_grad: bool = opt(False, "CxGrad: scale the backbone's gradients by the task's context")
    num_context_params: int = opt(100, "CxGrad: length of the context vector")
    context_params_learning_rate: float = opt(1.0, "CxGrad: step size of the context vector")

    # --- outer loop -------------------------------------------------------------------------------------------
    second_order: bool = opt(True, "differentiate through the inner gradients")
    first_order_to_second_order_epoch: int = opt(-1, "second order only in epochs after this one")
    use_multi_step_loss_optimization: bool = opt(False, "MSL (MAML++): weighted query loss after every inner step")
    multi_step_loss_num_epochs: int = opt(15, "MSL: epochs until only the last step counts")
    meta_learning_rate: float = opt(0.001, "Adam's learning rate at the start")
    min_learning_rate: float = opt(0.001, "learning rate at the end of the cosine schedule; equal: constant")
    clamp_outer_gradients: float = opt(0.0, "limit of each entry of the network's outer gradient (MAML++: 10); 0: none")
    lr_schedule: str | None = opt(
        None,
        "cosine stepped per_epoch (MAML++) or per_iteration with total_epochs iterations as half period, as the "
        "official CxGrad program does; default: per_iteration with contextual_grad, else per_epoch",
        ("per_epoch", "per_iteration"),
    )

    # --- experiment -------------------------------------------------------------------------------------------
    experiment_name: str = opt("experiment", "results go to experiments_dir/DATASET_NwayKshot/experiment_name")
    experiments_dir: str = opt("experiments", "folder that holds all results")
    seed: int = opt(104, "seed of the initial weights")
    total_epochs: int = opt(100, "epochs; each ends with a validation and a checkpoint")
    total_iter_per_epoch: int = opt(500, "training iterations in an epoch")
    num_evaluation_tasks: int = opt(600, "tasks of a validation or test")
    max_models_to_save: int = opt(5, "epoch checkpoints kept: the best by validation accuracy")
    top_n_models: int = opt(5, "checkpoints whose logits the ensemble test averages")
    continue_from_epoch: str = opt(
        "latest",
        "latest; from_scratch; or the number of a kept epoch. The last two hold each time the command is given",
    )
    evaluate_on_test_set_only: bool = opt(False, "no training: meta-test the checkpoints of this experiment")
    test_dataset: str | None = opt(None, "data set to meta-test on; default: dataset_name")
    gpu: str | None = opt(None, "GPU ids such as 0 or 0,1, or cpu; default: the first GPU if there is one, else cpu")
    dry_run: bool = opt(False, "two tiny iterations of everything on made-up images, in a folder that is then removed")
    name_of_args_json_file: str | None = opt(None, "JSON file of options; the command line wins over it")

    @classmethod
    def from_object(cls, source: object) -> "Options":
        """Options from an object's attributes of these names; missing ones take the defaults, others are ignored."""
        if isinstance(source, cls):
            source.validate()
            return source
        names = [field.name for field in dataclasses.fields(cls)]
        return cls.from_mapping({name: getattr(source, name) for name in names if hasattr(source, name)})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "options") -> "Options":
        """Options from a mapping of values or their text; raises UserError for an unknown name or a bad value."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := [name for name in values if name not in fields]:
            raise UserError(f"{origin}: " + "; ".join(unknown_name(name, fields) for name in unknown))
        options = cls(**{name: _convert(fields[name], value) for name, value in values.items()})
        options.validate()
        return options

    def validate(self) -> None:
        """Raise UserError where values are out of range or contradict one another."""
        for name in _AT_LEAST_ONE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_evaluation_tasks < 2:
            raise UserError("--num_evaluation_tasks must be at least 2: one task has no confidence interval")
        if self.image_channels not in (1, 3):
            raise UserError(f"--image_channels is {self.image_channels}; it must be 1 (grey) or 3 (RGB)")
        if self.top_n_models > self.max_models_to_save:
            raise UserError(
                f"--top_n_models {self.top_n_models} needs more checkpoints than --max_models_to_save "
                f"{self.max_models_to_save} keeps; raise the latter or lower the former"
            )
        if self.number_of_evaluation_steps_per_iter > self.number_of_training_steps_per_iter and (
            self.per_step_bn_statistics or self.learnable_per_layer_per_step_inner_loop_learning_rate or self.alfa
        ):
            raise UserError(
                "--per_step_bn_statistics, --learnable_per_layer_per_step_inner_loop_learning_rate and --alfa learn "
                f"one value per training step ({self.number_of_training_steps_per_iter}), so "
                f"--number_of_evaluation_steps_per_iter {self.number_of_evaluation_steps_per_iter} has none for the "
                "extra steps; use at most as many steps in evaluation"
            )
        self._validate_rules()
        if self.continue_from_epoch not in ("latest", "from_scratch") and not self.continue_from_epoch.isdigit():
            raise UserError(f"--continue_from_epoch is {self.continue_from_epoch!r}: latest, from_scratch or a number")
        for name in ("seed", "train_seed", "val_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be from 0 to 2**32 - 1")
        for name in _RATES:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be a number from 0 up")
        if self.min_learning_rate > self.meta_learning_rate:
            raise UserError(
                f"--min_learning_rate {self.min_learning_rate:g} is above --meta_learning_rate "
                f"{self.meta_learning_rate:g}; the schedule goes from the latter down to the former"
            )

    def _validate_rules(self) -> None:
        """Raise UserError for inner-loop rules that do not go together, with the reason."""
        lslr = self.learnable_per_layer_per_step_inner_loop_learning_rate
        rates = {
            "learnable_per_layer_per_step_inner_loop_learning_rate": lslr,
            "meta_sgd": self.meta_sgd,
            "alfa": self.alfa,
        }
        if len(chosen := [f"--{name}" for name, on in rates.items() if on]) > 1:
            raise UserError(f"{' and '.join(chosen)} each set the inner learning rate; choose one")
        head, body = (self.inner_loop_part == part for part in ("head", "body"))
        refusals = [
            (self.random_init and not self.alfa, "--random_init trains ALFA's rates only, so it needs --alfa true"),
            (
                self.contextual_grad and head,
                "--contextual_grad scales the body's gradients, which --inner_loop_part head (ANIL) never takes",
            ),
            (
                self.contextual_grad and self.attenuate,
                "--contextual_grad sets the norm of every tensor of the body, which "
                "undoes what --attenuate (L2F) did to it",
            ),
            (
                self.contextual_grad and self.alfa and bool(self.use_bias),
                "--contextual_grad gives every tensor of the body a norm, also biases, which batch norm cancels and "
                "which hold rounding noise only; --alfa would generate its rates from that. Use --use_bias false",
            ),
            (
                self.random_init and head,
                "--random_init leaves the body untrained and --inner_loop_part head (ANIL) never moves it",
            ),
            (
                self.random_init and body,
                "--random_init leaves the classifier untrained and --inner_loop_part body (BOIL) never moves it",
            ),
            (
                self.per_step_bn_statistics and self.batch_norm == "running",
                "--batch_norm running needs one set of "
                "statistics, --per_step_bn_statistics keeps one per step; choose --batch_norm per_step",
            ),
            (
                self.batch_norm == "per_step" and not self.per_step_bn_statistics,
                "--batch_norm per_step needs the statistics that training keeps with --per_step_bn_statistics true",
            ),
        ]
        for refused, reason in refusals:
            if refused:
                raise UserError(reason)
        if not all(width.isdigit() and int(width) for width in self.resnet_widths.split("-")):
            raise UserError(f"--resnet_widths is {self.resnet_widths!r}; it takes numbers such as 64-128-256-512")

    @property
    def turns_classes(self) -> bool:
        """Whether training tasks turn their classes."""
        return canonical_name(self.dataset_name) == "omniglot" if self.rotate_classes is None else self.rotate_classes

    @property
    def tracks_statistics(self) -> bool:
        """Whether training keeps running statistics of batch norm."""
        return self.per_step_bn_statistics or self.batch_norm == "running"

    @property
    def has_conv_bias(self) -> bool:
        official = (self.alfa or self.attenuate) and not self.contextual_grad
        return official if self.use_bias is None else self.use_bias

    @property
    def resnet_width_list(self) -> list[int]:
        return [int(width) for width in self.resnet_widths.split("-")]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.image_channels, self.image_height, self.image_width

    @property
    def evaluation_batch_size(self) -> int:
        return self.test_batch_size or self.batch_size


_RATES = (
    *("init_inner_loop_learning_rate", "init_inner_loop_weight_decay", "context_params_learning_rate"),
    *("meta_learning_rate", "min_learning_rate", "clamp_outer_gradients"),
)
_AT_LEAST_ONE = (
    *("image_height", "image_width", "num_classes_per_set", "num_samples_per_class", "num_target_samples"),
    *("batch_size", "test_batch_size", "tasks_per_pass", "num_dataprovider_workers"),
    *("cnn_num_filters", "num_stages", "num_context_params", "multi_step_loss_num_epochs"),
    *("number_of_training_steps_per_iter", "number_of_evaluation_steps_per_iter"),
    *("total_epochs", "total_iter_per_epoch", "num_evaluation_tasks", "max_models_to_save", "top_n_models"),
)


def parse_args(argv: Sequence[str] | None = None) -> Options:
    """Options of a command line (default: this process's); raises UserError for anything that is not right."""
    given, rest = command_line_parser().parse_known_args(argv)
    if rest:
        names = [word.lstrip("-").split("=")[0] for word in rest if word.startswith("--")]
        fields = [field.name for field in dataclasses.fields(Options)]
        problems = [unknown_name(name, fields, "--") for name in names] or [f"'{rest[0]}' belongs to no option"]
        raise UserError("; ".join(problems) + " (--help lists all)")
    values = vars(given)
    file = values.get("name_of_args_json_file")
    from_file = read_json(Path(file)) if file not in (None, "None") else {}
    return Options.from_mapping({**from_file, **values})


def command_line_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Options take a value; booleans are true or false.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Options):
        help_text = f"{field.metadata['help']} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=help_text, metavar=_type_name(field))
    return parser


def read_json(path: Path) -> dict[str, Any]:
    """The options in a JSON file; raises UserError naming the file and what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the options file {path}: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object of option names and values")
    fields = [field.name for field in dataclasses.fields(Options)]
    if unknown := [name for name in values if name not in fields and name not in DEAD_KEYS]:
        raise UserError(f"{path}: " + "; ".join(unknown_name(name, [*fields, *DEAD_KEYS]) for name in unknown))
    for name in values:
        if name in DEAD_KEYS:
            log.warning("%s: '%s' has no effect: %s", path, name, DEAD_KEYS[name])
    return {name: value for name, value in values.items() if name not in DEAD_KEYS}


# Keys of the official JSON files that decide nothing here, and why.
_NEVER_READ = "the official programs never read it"
DEAD_KEYS = {
    **dict.fromkeys(("cnn_blocks_per_stage", "cnn_num_blocks", "weight_decay", "dropout_rate_value"), _NEVER_READ),
    **dict.fromkeys(("meta_opt_bn", "learnable_batch_norm_momentum", "minimum_per_task_contribution"), _NEVER_READ),
    **dict.fromkeys(("evalute_on_test_set_only", "train_in_stages", "total_unique_tasks"), _NEVER_READ),
    **dict.fromkeys(("gpu_to_use", "num_of_gpus", "use_cuda", "use_gpu"), "--gpu says where to compute"),
    **dict.fromkeys(
        ("dataset_path", "sets_are_pre_split", "train_val_test_split"), "data sets are class folders by split"
    ),
    **dict.fromkeys(
        ("reset_stored_paths", "load_from_npz_files", "load_into_memory"), "images are cached by themselves"
    ),
    **dict.fromkeys(("indexes_of_folders_indicating_class", "labels_as_int"), "data sets are class folders by split"),
    **dict.fromkeys(("use_gdrive", "reverse_channels", "architecture_name"), "it has no counterpart"),
    "augment_images": "--rotate_classes says whether training turns classes",
    "samples_per_iter": "--batch_size counts the tasks of a meta-batch",
    "task_learning_rate": "--init_inner_loop_learning_rate is the inner rate",
    "continue_from_epoch": "a file cannot say where a run stands; the command line can",
}


def unknown_name(name: str, known: Iterable[str], prefix: str = "") -> str:
    """One sentence saying that an option does not exist, with the nearest that does."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean '{prefix}{nearest[0]}'?" if nearest else ""
    return f"there is no option '{prefix}{name}'{hint}"


def _base_type(field: "dataclasses.Field[Any]") -> type:
    """The type of a field, without the None of an optional one."""
    options = [kind for kind in get_args(field.type) if kind is not type(None)]
    return options[0] if options else field.type  # type: ignore[return-value]


def _type_name(field: "dataclasses.Field[Any]") -> str:
    return "|".join(field.metadata["choices"]) or _base_type(field).__name__.upper()


def _convert(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """A value or its text as the field's type; raises UserError naming the option and what it takes."""
    kind = _base_type(field)
    if value is None or (value == "None" and kind is not bool and field.default is None):
        if field.default is not None:
            raise UserError(f"--{field.name} needs a value ({kind.__name__})")
        return None
    try:
        converted = _boolean(value) if kind is bool else _number_or_text(kind, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"--{field.name} is {value!r}; it takes {_EXPECTED[kind]}") from error
    if field.metadata["choices"]:
        converted = {_folded(choice): choice for choice in field.metadata["choices"]}.get(
            _folded(str(converted)), converted
        )
    if field.metadata["choices"] and converted not in field.metadata["choices"]:
        raise UserError(f"--{field.name} is {value!r}; it is one of {', '.join(field.metadata['choices'])}")
    return converted


def _folded(choice: str) -> str:
    """4-CONV, 4conv and 4_conv are one choice."""
    return choice.lower().replace("-", "").replace("_", "")


def _number_or_text(kind: type, value: Any) -> Any:
    if isinstance(value, (bool, list, dict)) or (kind is int and float(value) != int(float(value))):
        raise ValueError(value)
    return kind(value)


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"
