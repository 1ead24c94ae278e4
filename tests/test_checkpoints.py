"""Checkpoint files are whole, safe to read, and say what is wrong with them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import test as test_entry
from few_shot_learning_system import MAMLFewShotClassifier
from head_learning_system import HeadFewShotClassifier
from tests.golden import facts
from tests.golden_cxgrad import Golden, load_cases
from utils import checkpoints
from utils.checkpoints import DamagedCheckpoint
from utils.errors import UserError
from utils.official_checkpoints import PIXELS_OF_MAP, infer_options, load_official, to_official
from utils.options import Options

ROOT = Path(__file__).resolve().parents[1]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = {"network": {"w": torch.arange(3.0)}, "epoch": 3, "rows": [{"a": 0.5}], "none": None}
    checkpoints.save(state, tmp_path / "new" / "latest")
    loaded = checkpoints.load(tmp_path / "new" / "latest")
    assert torch.equal(loaded.pop("network")["w"], torch.arange(3.0))
    assert loaded == {"epoch": 3, "rows": [{"a": 0.5}], "none": None}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["latest"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("network", 3),
        ("network", {"w": "x"}),
        ("network", {1: torch.zeros(2)}),
        ("network", {"w": torch.zeros(2, device="meta")}),
        ("network", {"w": torch.zeros(2, dtype=torch.complex64)}),
        ("options", [1]),
        ("options", {1: 2}),
        ("options", {"seed": torch.zeros(2)}),
        ("normalization", 0.5),
        ("normalization", ((0.5,), (0.5, 0.5))),
        ("normalization", ((float("nan"),), (0.5,))),
        ("normalization", ((10**400,), (0.5,))),
        ("history", {}),
        ("history", [3]),
        ("optimizer", {}),
        ("sums", {"loss": "x"}),
        ("sums", {"loss": float("nan")}),
        ("iterations_done", "many"),
        ("form", {"tasks": 3}),
        ("form", {"tasks_per_pass": 0, "captured": False}),
        ("form", {"tasks_per_pass": 1, "captured": False, "more": 1}),
    ],
)
def test_parts_of_another_kind_are_named(part: str, value: object, tmp_path: Path) -> None:
    torch.save({"network": {"w": torch.zeros(1)}, part: value}, tmp_path / "latest")
    with pytest.raises(DamagedCheckpoint, match=f"latest is damaged or not a checkpoint: its '{part}' is not"):
        checkpoints.load(tmp_path / "latest")


@pytest.mark.filterwarnings("ignore")  # torch is about to give such tensors up
def test_quantised_weights_are_none_of_a_training(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)
    torch.save({"network": {"w": quantised}}, tmp_path / "latest")
    with pytest.raises(DamagedCheckpoint, match="its 'network' is not"):
        checkpoints.load(tmp_path / "latest")


def test_numpy_numbers_beside_the_weights_are_read(tmp_path: Path) -> None:
    """Official checkpoints hold them: best accuracy, iteration, statistics of each epoch."""
    numbers = {"best_val_acc": np.float64(0.5), "iter": np.int64(7), "flag": np.bool_(True), "f": np.float32(2)}
    torch.save({"network": {"w": torch.zeros(1)}, "rows": {"loss": [np.float64(1.5)]}, **numbers}, tmp_path / "m_1")
    state = checkpoints.load(tmp_path / "m_1")
    assert state["best_val_acc"] == 0.5 and state["iter"] == 7 and state["flag"] and state["rows"] == {"loss": [1.5]}


@pytest.mark.parametrize("case", [n for n in load_cases() if "eval" not in n])
def test_official_weights_tell_how_they_were_made(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIXELS_OF_MAP, 1, 20)
    golden = Golden(case, load_cases()[case], "f32")
    found = infer_options({n[5:]: torch.from_numpy(a) for n, a in golden.arrays.items() if n.startswith("init/")})
    trained = golden.model().options
    for name in found.keys() - {"image_height", "image_width"}:
        assert found[name] == getattr(trained, name), name


@pytest.mark.parametrize("case", [n for n in load_cases() if "eval" not in n])
def test_official_checkpoints_with_their_json_file_score_as_recorded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIXELS_OF_MAP, 1, 20)
    golden = Golden(case, load_cases()[case], "f32")
    weights = {n[5:]: torch.from_numpy(a) for n, a in golden.arrays.items() if n.startswith("init/")}
    torch.save({"network": weights, "best_val_acc": np.float64(0.5)}, tmp_path / "train_model_1")
    config = facts("manifest")[case]["args"]  # which say use_bias: false in all cases
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--load", str(tmp_path / "train_model_1"), "--config", str(tmp_path / "config.json")]
    (file,), asked = test_entry.parse_command(words)
    options = test_entry.trained_options(checkpoints.load(file), file, asked)
    model = MAMLFewShotClassifier((2, 3, 20, 20), "cpu", options)
    model.load_checkpoint(file, with_optimizer=False)
    _, logits = model.run_validation_iter(golden.batch(0))
    recorded = golden.arrays["f64/eval/target_logits"]
    np.testing.assert_allclose(torch.stack(logits), recorded, atol=3e-4 * np.abs(recorded).max(), rtol=0)


def test_official_weights_load_with_and_without_the_module_prefix(tmp_path: Path) -> None:
    golden = Golden("cxgrad", load_cases()["cxgrad"], "f32")
    weights = {n[5:]: torch.from_numpy(a) for n, a in golden.arrays.items() if n.startswith("init/")}
    torch.save({"network": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "train_model_3")
    for source in (weights, tmp_path / "train_model_3"):
        model = golden.model(seed=1)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        load_official(model, source)
        found = to_official(dict(model.named_parameters()))
        assert all(torch.equal(parameter, weights[name]) for name, parameter in found.items())


def test_weights_of_a_resnet_with_its_earlier_names_load() -> None:
    """Once its layers were called blockN_convM and blockN_shortcut, numbered from 0; learned rates hold their names."""
    lslr = {"learnable_per_layer_per_step_inner_loop_learning_rate": True}
    options = Options.from_mapping({"backbone": "ResNet-12", "resnet_widths": "2-3", "batch_norm": "running"} | lslr)
    model = MAMLFewShotClassifier((2, 3, 16, 16), "cpu", options)
    weights = to_official({name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()})
    earlier = {}
    for name, tensor in weights.items():
        for block, layer, dot in itertools.product((1, 2), (1, 2, 3), ".-"):
            conv = f"block{block - 1}_conv{layer - 1}{dot}"
            name = name.replace(f"layer{block}{dot}conv{layer}{dot}", f"{conv}conv{dot}")
            name = name.replace(f"layer{block}{dot}bn{layer}{dot}", f"{conv}norm_layer{dot}")
            shortcut = f"block{block - 1}_shortcut{dot}"
            name = name.replace(f"layer{block}{dot}downsample{dot}0{dot}", f"{shortcut}conv{dot}")
            name = name.replace(f"layer{block}{dot}downsample{dot}1{dot}", f"{shortcut}norm_layer{dot}")
        earlier[name] = tensor
    assert "classifier.layer_dict.block1_conv2.norm_layer.running_var" in earlier
    assert "inner_loop_optimizer.names_learning_rates_dict.layer_dict-block0_shortcut-conv-weight" in earlier
    load_official(model, earlier)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in to_official(model.state_dict()).items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_weights_of_a_head_learner_load_from_a_file_and_as_they_are(prefix: str, tmp_path: Path) -> None:
    options = Options.from_mapping({"learner": "head", "head": "Ridge"})
    trained, other = (HeadFewShotClassifier((2, 3, 16, 16), "cpu", options) for _ in range(2))
    state = {part: {prefix + n: t + 1 for n, t in of.items()} for part, of in trained.weights().items()}
    torch.save(state, tmp_path / "best_model.pth")
    for source in (state, tmp_path / "best_model.pth"):
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
        load_official(other, source)
        assert other.head.scale == 2
        assert all(torch.equal(t, state["embedding"][prefix + n]) for n, t in other.embedding.state_dict().items())
    with pytest.raises(UserError, match="it was trained with --learner head"):
        load_official(MAMLFewShotClassifier((2, 3, 16, 16), "cpu", Options()), tmp_path / "best_model.pth")


def test_weights_that_do_not_fit_leave_the_model_alone() -> None:
    golden = Golden("cxgrad", load_cases()["cxgrad"], "f32")
    model = golden.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = dict(before)
    weights["classifier.layer_dict.linear.bias"] = torch.zeros(7)
    del weights["rules.CxGrad.generator.0.bias"]
    with pytest.raises(
        UserError, match=r"it lacks gamma_generator.0.bias; .*linear.bias is \(7,\), the model's is \(3,\)"
    ):
        load_official(model, weights)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
