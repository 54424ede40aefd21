"""The kernels that test_triton_compile.py compiles, one list for each backend module.

Block sizes, warps and stages come from the functions that the launchers use, so that what is
compiled is what is launched.
"""

from dataclasses import replace
from typing import Any

from triton_aot import Case

from lolkernels.backends import triton as rows
from lolkernels.backends import triton_finish, triton_rows, triton_sequences

ARCHS = (80, 90, 100)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SCALARS = {"scale": "fp32", "softcap": "fp32", "inv_temperature": "fp32"}


def compile_cases() -> list[Case]:
    """The kernels of the triton backend, on contiguous rows as the driver hands them over."""
    cases = []
    for arch in ARCHS:
        for x in BYTES:
            for vocab in (33, 128256):
                for cap in (False, True):
                    cases.append(exps_case(arch, x, None, vocab, cap))
        for x, out in (("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")):
            for cap in (False, True):
                cases.append(dlogits_case(arch, x, out, 128256, cap))
                cases.append(exps_case(arch, x, out, 50257 if cap else 128256, cap))
        cases += [sequence_case(arch, ratio, ref) for ratio in (0, 1, 2) for ref in (True, False)]
        cases += [finish_case(arch, table, unit) for table in BYTES for unit in (True, False)]
        cases += [labels_case(arch, x, both) for x in BYTES for both in (True, False)]
        cases += [one_column(exps_case(arch, "fp32", None, 1, False))]
        cases += [one_column(dlogits_case(arch, "fp32", "bf16", 1, True))]
        cases += [one_column(exps_case(arch, "fp32", "bf16", 1, False))]
        cases += [one_program_a_row(dlogits_case(arch, "bf16", "bf16", 50257, False))]
        for out, cap in ((None, False), ("bf16", False), ("bf16", True)):
            cases += [biased(exps_case(arch, "fp32", out, 50257, cap))]
        cases += [biased(dlogits_case(arch, "fp32", "bf16", 128256, cap)) for cap in (False, True)]
    return cases


def one_column(case: Case) -> Case:
    """V = 1: Triton compiles an integer argument of 1 as a constant."""
    ones = [k for k in ("V", "parts", "span", "x_row", "out_row") if k in case.signature]
    return replace(
        case,
        name=f"{case.name}-one",
        signature={k: v for k, v in case.signature.items() if k not in ones},
        constexprs={**case.constexprs, **dict.fromkeys(ones, 1)},
        aligned=[k for k in case.aligned if k not in ones],
        vector_loads=False,
        vector_stores=False,
    )


def biased(case: Case) -> Case:
    return replace(
        case,
        name=f"{case.name}-bias",
        signature={**case.signature, "bias_ptr": "*fp32"},
        constexprs={k: v for k, v in case.constexprs.items() if k != "bias_ptr"}
        | {"HAS_BIAS": True},
        aligned=[*case.aligned, "bias_ptr"],
    )


def one_program_a_row(case: Case) -> Case:
    """parts = 1, which is a constant, and a vocabulary that is no multiple of 16."""
    return replace(
        case,
        name=f"{case.name}-whole",
        signature={k: v for k, v in case.signature.items() if k != "parts"},
        constexprs={**case.constexprs, "parts": 1},
    )


def dlogits_case(arch: int, x: str, out: str, vocab: int, cap: bool) -> Case:
    block, warps = rows.dlogits_block(vocab, cap)
    vectors = ("lse_ptr", "a_ptr", "b_ptr", "c_ptr", "logps_ptr")
    signature: dict[str, Any] = {"x_ptr": f"*{x}", "labels_ptr": "*i64", "out_ptr": f"*{out}"}
    signature |= dict.fromkeys(vectors, "*fp32")
    signature |= dict.fromkeys(("V", "parts", "span", "x_row", "out_row"), "i32") | SCALARS
    ones = ("x_col", "out_col", "labels_row", "lse_row", "a_row", "b_row", "c_row", "logps_row")
    return Case(
        name=f"dlogits-sm{arch}-{x}-{out}{'-cap' * cap}",
        fn=triton_rows.dlogits,
        signature=signature,
        constexprs=dict.fromkeys(ones, 1)
        | {"CAP": cap, "HAS_LOGPS": True, "ALIASED": x != out, "BLOCK": block}
        | {"HAS_BIAS": False, "bias_ptr": None},
        arch=arch,
        num_warps=warps,
        num_stages=rows.STAGES,
        aligned=("x_ptr", "labels_ptr", "out_ptr", *vectors, "span", "x_row", "out_row"),
        vector_loads=True,
        vector_stores=True,
    )


def exps_case(arch: int, x: str, out: str | None, vocab: int, cap: bool) -> Case:
    """With an anchor where the vocabulary is a multiple of 16, without one where it is not; without
    one too where only the sums are made: out is None."""
    block, warps = rows.exps_block(vocab)
    even = vocab % 16 == 0
    given = even and out is not None
    sums = ("used_ptr", "rest_ptr", "deviation_ptr", "max_ptr", "target_ptr", "slope_ptr")
    signature: dict[str, Any] = {"x_ptr": f"*{x}", "labels_ptr": "*i64"}
    signature |= dict.fromkeys(sums, "*fp32") | dict.fromkeys(("V", "x_row", "out_row"), "i32")
    signature |= SCALARS | {"shift": "fp32", "reach": "fp32"}
    signature |= {"anchor_ptr": "*fp32"} if given else {"anchor_row": "i32"}
    signature |= {"out_col": "i32"} if out is None else {"out_ptr": f"*{out}"}
    constexprs: dict[str, Any] = dict.fromkeys(("x_col", "labels_row"), 1)
    constexprs |= {"anchor_row": 1} if given else {"anchor_ptr": None}
    constexprs |= {"out_ptr": None} if out is None else {"out_col": 1}
    constexprs |= {"HAS_ANCHOR": given, "CAP": cap, "AT_TOP": out == "fp16", "BLOCK": block}
    constexprs |= {"WRITE": out is not None, "HAS_BIAS": False, "bias_ptr": None}
    aligned = ["x_ptr", "labels_ptr", *sums, "x_row", "out_row"]
    aligned += ["out_col" if out is None else "out_ptr"]
    return Case(
        name=f"exps-sm{arch}-{x}-{out}-{vocab}{'-cap' * cap}",
        fn=triton_rows.exps,
        signature=signature,
        constexprs=constexprs,
        arch=arch,
        num_warps=warps,
        num_stages=rows.STAGES,
        aligned=[*aligned, *(["V"] if even else []), *(["anchor_ptr"] if given else [])],
        vector_loads=vocab > 1000,
        vector_stores=out is not None,
    )


def sequence_case(arch: int, ratio: int, ref: bool) -> Case:
    outs = ("loss_ptr", "coef_ptr", "log_ratio_ptr", "clipped_ptr")
    signature = dict.fromkeys(("logps_ptr", "weight_ptr", *outs), "*fp32") | {"cu_ptr": "*i64"}
    signature |= dict.fromkeys(("log_low", "log_high", "beta"), "fp32")
    signature |= {"scale_ptr": "*fp32", "flags_ptr": "*i32"}
    constexprs: dict[str, Any] = {"HAS_REF": ref, "RATIO": ratio, "HAS_BETA": True}
    constexprs |= {"HAS_SCALE": True, "HAS_FLAGS": True}
    constexprs |= {"BLOCK": rows.SEQUENCE_BLOCK} | ({} if ref else {"ref_ptr": None})
    return Case(
        name=f"sequence_coef-sm{arch}-{ratio}{'-ref' * ref}",
        fn=triton_sequences.sequence_coef,
        signature=signature | ({"ref_ptr": "*fp32"} if ref else {}),
        constexprs=constexprs,
        arch=arch,
        num_warps=4,
        num_stages=rows.STAGES,
    )


def finish_case(arch: int, table: str, unit: bool) -> Case:
    """With the flags of a GPU; scoring and existing logits have no unit."""
    names = ["anchor_ptr", "rest_ptr", "deviation_ptr", "max_ptr", "target_ptr", "slope_ptr"]
    names += [f"{name}_out" for name in ("logps", "lse", "entropy", "max", "target", "slope")]
    vectors = dict.fromkeys([*names, "rest_out", "share_out"], "*fp32")
    signature = {"labels_ptr": "*i64", "flags_ptr": "*i32", "V": "i32", **vectors}
    constexprs: dict[str, Any] = {"labels_row": 1, "HAS_FLAGS": True, "HAS_UNIT": unit}
    sizes = dict.fromkeys(("D", "unit_row", "table_row"), "i32")
    sizes |= {"unit_ptr": "*fp32", "table_ptr": f"*{table}"}
    if unit:
        signature |= sizes
        constexprs["table_col"] = 1
    else:
        nothing = {k: None if k.endswith("_ptr") else 0 for k in sizes}
        constexprs |= {**nothing, "table_col": 0}
    return Case(
        name=f"finish-sm{arch}-{table}{'-unit' * unit}",
        fn=triton_finish.finish,
        signature=signature,
        constexprs=constexprs | {"BLOCK": rows.WIDTH},
        arch=arch,
        num_warps=4,
        num_stages=1,
        aligned=[k for k in signature if k.endswith(("_ptr", "_row")) or k == "D"],
        vector_loads=unit,
        vector_stores=unit,
    )


def labels_case(arch: int, x: str, both: bool) -> Case:
    vectors = ("a_ptr", "logps_ptr", "rest_ptr", "slope_ptr", *(("both_ptr",) if both else ()))
    signature = {"table_ptr": f"*{x}", "rows_ptr": f"*{x}", "labels_ptr": "*i64"}
    signature |= dict.fromkeys(vectors, "*fp32")
    signature |= dict.fromkeys(("n", "V", "D", "table_row", "rows_row"), "i32")
    constexprs: dict[str, Any] = dict.fromkeys(("labels_row", "rows_col", "a_row"), 1)
    constexprs |= {"both_row": 1} if both else {"both_ptr": None, "both_row": 0}
    return Case(
        name=f"add_labels-sm{arch}-{x}{'-both' * both}",
        fn=triton_finish.add_labels,
        signature=signature,
        constexprs=constexprs | {"HAS_BOTH": both, "SCAN": rows.WIDTH, "BLOCK": rows.WIDTH},
        arch=arch,
        num_warps=4,
        num_stages=1,
        aligned=[k for k in signature if k.endswith(("_ptr", "_row")) or k == "D"],
        vector_loads=True,
        vector_stores=True,
    )
