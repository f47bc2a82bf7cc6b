"""The README's table of what works: every row names a test that exists, and the text is current.

``python tests/test_support.py`` writes the table into the README.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support: begin -->\n", "<!-- support: end -->\n"

# What, how far, and the test that fails if it stops working.
ROWS = [
    (
        "`torch.compile(fullgraph=True)`, dynamic shapes",
        "one graph for all shapes ('same' with a stride: one a shape), the eager bits",
        "test_compile.py::test_one_graph_for_all_shapes",
    ),
    (
        "Compiled autograd of eager calls",
        "one graph, the eager bits",
        "test_compile.py::test_compiled_autograd",
    ),
    (
        "`torch.func` inside `torch.compile`",
        "grad, jvp, vmap, hessian",
        "test_compile.py::test_transforms_inside",
    ),
    ("Inductor, forward and backward", "yes", "test_compile.py::test_the_default_backend"),
    (
        '`mode="reduce-overhead"`',
        "written, tested where there is a GPU",
        "test_compile.py::test_reduce_overhead",
    ),
    ("`torch.export`, dynamic batch, save and load", "yes", "test_export.py::test_export_and_save"),
    (
        "Training an exported module",
        "gradients of the eager module",
        "test_export.py::test_train_the_exported_module",
    ),
    (
        "AOTInductor package in a fresh process",
        "after `import torch_naiveconv` there",
        "test_export.py::test_aot_inductor_package_in_a_fresh_process",
    ),
    (
        "`torch.func` and forward mode",
        "all, and transforms of transforms",
        "test_func.py::test_transform",
    ),
    (
        "`vmap`",
        "folded into batch or groups, one call",
        "test_func.py::test_vmap_is_folded_into_groups_and_batch",
    ),
    ("Per-sample gradients", "yes", "test_func.py::test_per_sample_gradients_of_a_model"),
    ("`torch.library.opcheck`", "all tests, every operator", "test_opcheck.py::test_operator"),
    (
        "Autocast, CPU and CUDA",
        "the region's type; CUDA tested where there is a GPU",
        "test_autocast.py::test_types_follow_the_region",
    ),
    ("`GradScaler`", "yes", "test_autocast.py::test_grad_scaler"),
    (
        "channels_last",
        "kept forward, backward, eager and compiled",
        "test_memory_format.py::test_convolution",
    ),
    (
        "Activation checkpointing",
        "both kinds",
        "test_memory_format.py::test_activation_checkpointing",
    ),
    ("DDP and FSDP", "gradients of one process", "test_distributed.py::test_two_processes"),
    (
        "`use_deterministic_algorithms(True)`",
        "accepted everywhere",
        "test_ecosystem.py::test_deterministic_algorithms",
    ),
    ("`FlopCounterMode`", "counts as for aten", "test_ecosystem.py::test_flops"),
    ("Profiler", "readable names", "test_ecosystem.py::test_profiler_names"),
    ("`DataLoader` workers", "fork and spawn", "test_ecosystem.py::test_workers"),
    ("Threads that call at once", "yes", "test_ecosystem.py::test_many_threads_at_once"),
    ("Meta tensors, tensor subclasses", "yes", "test_ecosystem.py::test_meta_tensors"),
    (
        "`torch.fx.symbolic_trace`",
        "the functions are leaves",
        "test_ecosystem.py::test_fx_symbolic_trace",
    ),
    (
        "TorchScript",
        "refused, with what to do",
        "test_ecosystem.py::test_torchscript_is_refused",
    ),
    (
        "`convert` with `weight_norm` and lazy layers",
        "yes",
        "test_ecosystem.py::test_convert_parametrized_layers",
    ),
    (
        "One wheel, `py3-none-<platform>`",
        "stable ABI only",
        "test_wheel.py::test_libraries_use_the_stable_abi_only",
    ),
    (
        "The wheel on torch 2.14.1 and 2.15.0",
        "all of `tools/check_wheel.py`; CI runs it on 2.13.0 and pip's newest",
        "test_wheel.py::test_wheels",
    ),
    (
        "A build without ninja or without nvcc",
        "one line that says what to do; CI builds with and without isolation, editable, with uv",
        "test_wheel.py::test_build_without_ninja",
    ),
    (
        "A broken install",
        "one line that says what to do",
        "test_doctor.py::test_a_package_that_cannot_be_imported",
    ),
    (
        "Sparse and nested tensors, float8",
        "refused, with what to do",
        "test_errors.py::test_bad_input",
    ),
    (
        "ResNet-50, ConvNeXt, MobileNet, U-Net, wav2vec 2.0 ...",
        "agree, forward and training step",
        "test_models.py::test_model",
    ),
]


def table():
    lines = ["| what | how far | test |", "|---|---|---|"]
    lines += [
        f"| {what} | {how} | [`{test.split('::')[1]}`](tests/{test.split('::')[0]}) |"
        for what, how, test in ROWS
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("test", [row[2] for row in ROWS])
def test_its_test_exists(test):
    file, name = test.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_readme_is_current():
    text = (ROOT / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.split(BEGIN)[1].split(END)[0].strip() == table().strip()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    readme.write_text(head + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1])
