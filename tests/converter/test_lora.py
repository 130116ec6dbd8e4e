# SPDX-License-Identifier: Apache-2.0
"""PEFT's folders and LoRA-Flow's gate files: read exactly, or refused by the name of what is not supported."""

import json
import math

import pytest
import torch
from deltaweave.converter.errors import CheckpointError
from deltaweave.converter.lora import read_loraflow_gate, read_peft_lora
from safetensors.torch import save_file

Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def write_folder(folder, ranks=None, dtype=torch.bfloat16, tensors=None, **settings):
    """A folder as PEFT writes it; settings that are off are there too."""
    ranks = ranks or {Q_PROJ: 4, UP_PROJ: 4}
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "bias": "none", "use_dora": False, "modules_to_save": None, "init_lora_weights": True, "fan_in_fan_out": False,
        "target_modules": ["q_proj", "up_proj"], "megatron_core": "megatron.core", "qalora_group_size": 16,
        "lora_bias": False,
    }  # fmt: skip
    stored = {}
    for module, rank in ranks.items():
        stored[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, 8).to(dtype)
        stored[f"base_model.model.{module}.lora_B.weight"] = torch.randn(6, rank).to(dtype)
    folder.mkdir(exist_ok=True)
    save_file(stored | (tensors or {}), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder, stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_exact(tmp_path, dtype):
    folder, stored = write_folder(tmp_path / "math", dtype=dtype)
    lora = read_peft_lora(folder)
    assert lora.name == "math" and set(lora.modules) == {Q_PROJ, UP_PROJ}
    for name, matrix in lora.modules.items():
        for side, values in (("A", matrix.a), ("B", matrix.b)):
            expected = stored[f"base_model.model.{name}.lora_{side}.weight"].float().numpy()
            assert (values.to_float32() == expected).all()
        assert matrix.scale == 4.0 and matrix.shape == (6, 8) and matrix.rank == 4


@pytest.mark.parametrize(
    ("settings", "ranks", "scales"),
    [
        ({"use_rslora": True}, {Q_PROJ: 4, UP_PROJ: 4}, {Q_PROJ: 8.0, UP_PROJ: 8.0}),
        ({"rank_pattern": {"up_proj": 2}}, {Q_PROJ: 4, UP_PROJ: 2}, {Q_PROJ: 4.0, UP_PROJ: 8.0}),
        ({"alpha_pattern": {"q_proj": 2}}, {Q_PROJ: 4, UP_PROJ: 4}, {Q_PROJ: 0.5, UP_PROJ: 4.0}),
        (
            {"rank_pattern": {r"layers.\d.mlp.up_proj": 3}, "alpha_pattern": {"mlp.up_proj": 1}, "use_rslora": True},
            {Q_PROJ: 4, UP_PROJ: 3},
            {Q_PROJ: 8.0, UP_PROJ: 1 / math.sqrt(3)},
        ),
        ({"rank_pattern": {"proj": 2}}, {Q_PROJ: 4, UP_PROJ: 4}, {Q_PROJ: 4.0, UP_PROJ: 4.0}),
    ],
)  # fmt: skip
def test_scales(tmp_path, settings, ranks, scales):
    folder, _ = write_folder(tmp_path / "lora", ranks, **settings)
    assert {name: matrix.scale for name, matrix in read_peft_lora(folder).modules.items()} == scales


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is set: DoRA is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"use_qalora": True}, "qalora"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' is not supported"),
        ({"init_lora_weights": {}}, "init_lora_weights '{}'"),
        ({"some_future_feature": 3}, "some_future_feature is set"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA', expected 'LORA'"),
        ({"r": 8}, "has rank 8, its stored matrices have 4"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"rank_pattern": [1]}, "rank_pattern is a list"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": {"(a+)+$": 4}}, r"rank_pattern '\(a\+\)\+\$' is not supported"),
        ({"alpha_pattern": {".*.*.*.*proj": 4}}, "at most three"),
        ({"rank_pattern": {"(?=x)": 4}}, "not supported"),
    ],
)
def test_features_are_refused_by_name(tmp_path, settings, message):
    folder, _ = write_folder(tmp_path / "lora", **settings)
    with pytest.raises(CheckpointError, match=message):
        read_peft_lora(folder)


def test_tensors_that_are_no_lora(tmp_path):
    name = f"base_model.model.{Q_PROJ}.lora_magnitude_vector.weight"
    folder, _ = write_folder(tmp_path / "a", tensors={name: torch.ones(6)})
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.weight is no LoRA of a linear layer"):
        read_peft_lora(folder)
    name = "base_model.model.model.norm.lora_A.weight"
    folder, _ = write_folder(tmp_path / "b", tensors={name: torch.ones(4, 8)})
    with pytest.raises(CheckpointError, match=r"model.norm has lora_A alone"):
        read_peft_lora(folder)
    name = f"base_model.model.{Q_PROJ}.lora_A.weight"
    folder, _ = write_folder(tmp_path / "c", tensors={name: torch.ones(4, 8, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="dtype I32"):
        read_peft_lora(folder)


def test_folders_that_are_incomplete(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not readable"):
        read_peft_lora(tmp_path)
    folder, _ = write_folder(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="too short"):
        read_peft_lora(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_peft_lora(folder)


def gate_tensors(layers, count=2, bias_shape=(2,)):
    tensors = {}
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}.lora_fusion_gate."
        tensors[prefix + "weight"] = torch.randn(count, 16, dtype=torch.float16)
        tensors[prefix + "weight_bias"] = torch.randn(bias_shape, dtype=torch.float16)
    return tensors


def test_released_gates(tmp_path):
    tensors = gate_tensors(12)
    save_file(tensors, tmp_path / "gate.safetensors")
    gate = read_loraflow_gate(tmp_path / "gate.safetensors", temperature=1.1)
    assert gate.temperature == 1.1 and list(gate.blocks) == [f"model.layers.{layer}" for layer in range(12)]
    for layer, block in enumerate(gate.blocks.values()):
        prefix = f"encoder.layers.{layer}.lora_fusion_gate."
        assert (block.weight.data == tensors[prefix + "weight"].numpy()).all()
        assert (block.bias.data == tensors[prefix + "weight_bias"].numpy()).all()


def test_gates_that_are_incomplete(tmp_path):
    path = tmp_path / "gate.safetensors"
    tensors = gate_tensors(3)
    save_file({name: value for name, value in tensors.items() if ".1." not in name}, path)
    with pytest.raises(CheckpointError, match="layer 1 lacks"):
        read_loraflow_gate(path)
    save_file(tensors | {"encoder.norm.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"encoder.norm.weight is no gate"):
        read_loraflow_gate(path)
    save_file(gate_tensors(1, count=3), path)
    with pytest.raises(CheckpointError, match="gate of shape"):
        read_loraflow_gate(path)
