"""How the servers behind the measured rows were launched: what the benchmark's public scripts set.

Most rows come from InferenceMAX / InferenceX (SemiAnalysisAI), whose client and launch scripts are public; settings
here were read in the scripts of its repository between October 2025 and May 2026 (`benchmarks/single_node/*.sh`,
`utils/bench_serving/benchmark_serving.py`), engine defaults in SGLang's `server_args.py`, vLLM's `engine/arg_utils.py`
and TensorRT-LLM's `llmapi` documentation. Other rows name no script: they get the engines' defaults.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from validate.silicon.rows import Layout, SiliconRow

HOPPER = ("h100_sxm", "h200_sxm")
# utils/bench_serving: lengths are drawn evenly from 0.8 of the nominal one to it; ten prompts for each place.
RANGE_RATIO, ROUNDS = 0.8, 10
# What was calibrated, each the value of the least median error over even cells (validate/silicon/rows.py says which
# those are). Seconds that HTTP and processes take with a request, by engine, and of TensorRT-LLM where one process does
# all of it; seconds that a token of the prompt takes from the client's text to the queue (tokenizer); seconds of
# SGLang's first step of full size, when its kernels are compiled; the share of MTP drafts that is accepted.
FRONT_END_S = {"vllm": 0.015, "trtllm": 0.02, "sglang": 0.13}
ONE_PROCESS_S = 0.115
PROMPT_TOKEN_S = 4e-6
SGLANG_COLD_S = 70.0
MTP_ACCEPTANCE = 0.7
# batch_wait_timeout_iters and batch_wait_max_tokens_ratio of the scripts that set them.
DELAYED = (40, 0.8)
# vLLM's Marlin kernel as the tables name it for weights of 4 bits. Its MXFP4 rows are of a model of 896 experts, whose
# sorting takes 30 us more than that of the 384 experts of the int4 rows; gpt-oss has 128.
WNA16_MARLIN = "wna16marlin"
_DATE = re.compile(r"measured=(\d{4}-\d{2}-\d{2})")


@dataclass(frozen=True)
class Settings:
    """What a row's server was told.

    batch_tokens, running: of one attention-DP rank. chunked: whether prompts are cut. kv: type of the KV cache. dense,
    attention, experts: types of the products. experts_from: the engine whose expert kernels ran, where another engine's
    tables hold them. poll_steps: SGLang's --scheduler-recv-interval. memory: the engine's own option. drafts,
    acceptance: of multi-token prediction. cold_s: what the first step of `batch_tokens` tokens takes more, as nothing
    warmed the server up. front_end_s: of a request, before its prompt is queued. gather: type that an all-gather sends.
    hold_steps, gather_steps: TensorRT-LLM's attention_dp_config. balance: which attention-DP rank a request goes to.
    experts_kernel: word in the name of the kernel that ran. wait_steps, wait_share: TensorRT-LLM's batch_wait options.
    rounds: prompts for each place of the closed loop.
    """

    batch_tokens: int
    running: int
    chunked: bool
    kv: str
    dense: str
    attention: str | None
    experts: str
    experts_from: str | None
    experts_version: str | None
    poll_steps: int
    memory: float
    range_ratio: float
    drafts: int = 0
    acceptance: float = 0.0
    cold_s: float = 0.0
    front_end_s: float = 0.0
    gather: str | None = None
    hold_steps: int = 0
    gather_steps: int = 0
    balance: str = "round_robin"
    experts_kernel: str | None = None
    wait_steps: int = 0
    wait_share: float = 0.0
    rounds: int = ROUNDS


def benchmark(row: SiliconRow) -> bool:
    """Whether the row comes from the public benchmark, whose client draws lengths."""
    return "gap-analysis/data" not in row.source


def measured_on(row: SiliconRow) -> str:
    """The date of the measurement as YYYY-MM-DD; empty where the source does not say."""
    found = _DATE.search(row.source)
    return found.group(1) if found else ""


def version_of(row: SiliconRow) -> tuple[int, ...]:
    """The engine's version as numbers, for comparisons; empty where the row does not say."""
    return tuple(int(part) for part in re.findall(r"\d+", row.version)[:3])


def clients_limit(row: SiliconRow) -> bool:
    """Whether the concurrency of the row is only the client's limit.

    gptoss_fp4_h100_docker.sh had `--max-concurrency 512` written in, while the server's `--max-num-seqs` and a tenth of
    the number of prompts were the concurrency of the run, which these rows do not hold.
    """
    return (
        row.engine == "vllm" and row.system == "h100_sxm" and "gpt-oss" in row.model and row.concurrency == 512
    ) and benchmark(row)


def layout_of(row: SiliconRow) -> Layout:
    """The layout that ran, where the columns or the scripts say another than the sizes taken by themselves.

    Sizes of the dump are multiplied where attention DP equals TP and EP is its square: such an instance has TP GPUs.
    It ran attention DP where the script knows it (MiniMax-M2.5 from vLLM 0.19 on); Kimi-K2.5's did not, and the same
    measurements stand in the other dump as TP with EP. Scripts of SGLang for DeepSeek in FP4, and vLLM's first ones for
    MiniMax-M2.5, spread whole experts whatever the row says.
    """
    layout = _of_trtllm(row)
    if layout.attention_dp == layout.tp > 1 and layout.ep == layout.tp**2:
        if "MiniMax" in row.model and row.system not in HOPPER and version_of(row) >= (0, 19):
            return Layout(1, layout.pp, layout.tp, 1, layout.tp)
        return Layout(layout.tp, layout.pp, 1, 1, layout.tp)
    whole = row.engine == "sglang" and "DeepSeek" in row.model and row.precision == "fp4"
    first = row.engine == "vllm" and "MiniMax" in row.model and row.precision == "fp8"
    whole |= first and (row.system in HOPPER or (0,) < version_of(row) < (0, 19))
    if whole and layout.attention_dp == 1 and layout.ep == 1:
        return Layout(layout.tp, layout.pp, 1, 1, layout.tp)
    return layout


def _of_trtllm(row: SiliconRow) -> Layout:
    """TensorRT-LLM's scripts for DeepSeek before version 1.2 (February 2026) spread experts and attention by load.

    dsr1_{fp4_b200,fp8_b200,fp8_h200}_trt.sh: EP = TP for FP8; for FP4 at TP8 from 16 in flight on, at TP4 from 64 on,
    of long prompts at TP4 always. Attention DP above 64 in flight (FP4: from 256 on), of long prompts above 32 (FP4:
    from 64 on). Rows of the second dump say EP 1 for all of them.
    """
    layout, load = row.layout, row.in_flight or 0
    early = row.engine == "trtllm" and "DeepSeek" in row.model and version_of(row) < (1, 2) and benchmark(row)
    if not early or layout.attention_dp > 1 or layout.tp < 2:
        return layout
    long = row.isl > 4096
    if row.precision == "fp4":
        spread = load >= 64 if layout.tp == 4 else load >= 16
        spread = layout.tp == 4 or load >= 64 if long else spread
        parted = load >= (64 if long else 256)
    else:
        spread, parted = True, load > (32 if long else 64)
    if parted:
        return Layout(1, layout.pp, layout.tp, 1, layout.tp)
    return Layout(layout.tp, layout.pp, 1, 1, layout.tp) if spread else layout


def settings_of(row: SiliconRow, layout: Layout) -> Settings:
    """The settings of a row's server."""
    dense, attention, experts = _types(row)
    concurrency = max(1, row.in_flight or 1)
    here = -(-concurrency // layout.attention_dp)
    tokens, chunked = _budget(row, here)
    # attention_dp_config: gpt-oss has the defaults of the engine, DeepSeek 60 and 0.
    held = (50, 10) if "gpt-oss" in row.model else (60, 0)
    return Settings(
        batch_tokens=tokens,
        running=concurrency if layout.attention_dp > 1 else here,
        chunked=chunked,
        kv=_kv(row),
        dense=dense,
        attention=attention,
        experts=experts,
        experts_from=_kernels(row, layout),
        experts_version=_kernel_version(row),
        poll_steps=_poll(row, concurrency),
        memory=_memory(row),
        range_ratio=RANGE_RATIO,
        drafts=_drafts(row, layout),
        acceptance=MTP_ACCEPTANCE,
        cold_s=SGLANG_COLD_S if _cold(row) else 0.0,
        front_end_s=_front_end_s(row),
        # NVFP4 is quantised before the all-gather (TensorRT-LLM: post-quant all-gather; vLLM: FlashInfer's).
        gather="nvfp4" if experts == "nvfp4" and row.engine in ("trtllm", "vllm") else None,
        hold_steps=held[0] if row.engine == "trtllm" else 0,
        gather_steps=held[1] if row.engine == "trtllm" else 0,
        balance="shortest_queue" if row.engine in ("vllm", "trtllm") else "round_robin",
        experts_kernel=WNA16_MARLIN if _marlin(row) else None,
        # glm5_fp8_h200.sh sends five prompts for each place, all other scripts ten.
        rounds=5 if "GLM" in row.model and row.system in HOPPER and benchmark(row) else ROUNDS,
        wait_steps=DELAYED[0] if _delayed(row, layout) else 0,
        wait_share=DELAYED[1] if _delayed(row, layout) else 0.0,
    )


def _drafts(row: SiliconRow, layout: Layout) -> int:
    """Tokens that multi-token prediction drafts in a step; no column says so, but the source text does for some rows.

    Release 1.2.0rc6.post3 of TensorRT-LLM was the image of the *-trt-mtp configurations only: perf-changelog.yaml,
    #632, and the note that the tags of plain and MTP configurations, `.post2` and `.post3`, were later made one. On
    2026-01-14 the run was that of #392, which added these configurations. The scripts draft three tokens, and one under
    attention DP (dsr1_*_trt_mtp.sh).
    """
    if row.engine != "trtllm" or "DeepSeek" not in row.model or not benchmark(row):
        return 0
    if row.version == "1.2.0rc6.post3" or measured_on(row) == "2026-01-14":
        return 1 if layout.attention_dp > 1 else 3
    return 0


def _cold(row: SiliconRow) -> bool:
    """SGLang on Blackwell from v0.5.5 (November 2025) until the client warmed servers up (#480, end of January)."""
    blackwell = row.system not in HOPPER
    return row.engine == "sglang" and blackwell and benchmark(row) and "2025-11-03" <= measured_on(row) < "2026-01-29"


def _front_end_s(row: SiliconRow) -> float:
    """TensorRT-LLM's scripts for gpt-oss give replies four processes of their own; those for DeepSeek do not."""
    one_process = row.engine == "trtllm" and "gpt-oss" not in row.model and benchmark(row)
    fixed_s = ONE_PROCESS_S if one_process else FRONT_END_S.get(row.engine, 0.0)
    return fixed_s + PROMPT_TOKEN_S * row.isl * (1.0 + RANGE_RATIO) / 2.0


def _types(row: SiliconRow) -> tuple[str, str | None, str]:
    """Types of dense products, of attention's projections (None = as dense) and of experts, as the checkpoints have it.

    gpt-oss: experts alone are MXFP4 (its config.json); on Blackwell they meet FP8 activations (FlashInfer). Kimi-K2.5:
    experts alone, in int4 or NVFP4. NVIDIA's NVFP4 checkpoints leave attention in bf16 (hf_quant_config.json), that of
    MiniMax-M2.5 has no other dense product. FP8 is scaled by blocks of 128 in DeepSeek, Qwen3, MiniMax and GLM.
    """
    if "gpt-oss" in row.model:
        return "bf16", None, "mxfp4" if row.system in HOPPER else "w4a8_mxfp4_mxfp8"
    if row.precision == "bf16":
        return "bf16", None, "bf16"
    if "Kimi" in row.model:
        return "bf16", None, "int4" if row.precision == "int4" else "nvfp4"
    if row.precision == "fp4":
        return "bf16" if "MiniMax" in row.model else "nvfp4", "bf16", "nvfp4"
    return "fp8_block", None, "fp8_block"


def _kv(row: SiliconRow) -> str:
    blackwell = row.system not in HOPPER
    if row.engine == "trtllm":
        return "fp8" if blackwell or "gpt-oss" not in row.model else "bf16"
    if row.engine == "sglang":
        return "fp8" if blackwell else "bf16"
    if "gpt-oss" in row.model:
        return "fp8" if blackwell and measured_on(row) >= "2025-12" else "bf16"
    if row.precision == "fp4":
        return "fp8"  # as NVIDIA's checkpoints say (hf_quant_config.json), which vLLM heeds since #29980
    if "Kimi" in row.model:
        return "bf16"
    if "MiniMax" in row.model:
        return "fp8" if blackwell and version_of(row) >= (0, 19) else "bf16"
    return "bf16"


def _memory(row: SiliconRow) -> float:
    """The engine's own memory option, by script; else the engine's default (SGLang has none that is fixed: 0.85).

    SGLang's dsr1_fp8_{b200,h200}.sh, dsr1_fp4_b200.sh and glm5_fp8_{b200,h200}.sh; TensorRT-LLM's dsr1_fp4_b200_trt.sh,
    dsr1_fp8_{b200,h200}_trt.sh and gptoss_fp4_{b200,h200}_trt.sh; vLLM's kimik2.5_*, minimaxm2.5_* and gptoss_fp4_*.
    """
    if not benchmark(row):
        return {"sglang": 0.85, "trtllm": 0.9, "vllm": 0.9}.get(row.engine, 0.9)
    deepseek, fp8 = "DeepSeek" in row.model, row.precision == "fp8"
    if row.engine == "sglang":
        small = row.layout.tp * row.layout.attention_dp == 4 and row.system not in HOPPER
        return (0.95 if small else 0.82) if deepseek and fp8 else 0.85
    if row.engine == "trtllm":
        if not deepseek:
            return 0.85
        return 0.75 if row.system in HOPPER else 0.8
    return 0.9 if "gpt-oss" in row.model or ("Kimi" in row.model and row.precision == "fp4") else 0.95


def _budget(row: SiliconRow, here: int) -> tuple[int, bool]:
    """Tokens of a batch on one attention-DP rank, and whether prompts are cut to fit."""
    if row.engine == "trtllm":
        if "gpt-oss" in row.model:
            return 20000, False
        asked = -(-(here + row.isl + 64) // 64) * 64
        # From the scripts of January 2026 on never below 8192.
        return max(asked, 8192 if measured_on(row) >= "2026-01" else 0), False
    if row.engine == "vllm":
        later = "MiniMax" in row.model or ("Kimi" in row.model and row.precision == "fp4")
        wide = later and row.system not in HOPPER and (version_of(row) >= (0, 19) or measured_on(row) >= "2026-04")
        return 2 * row.isl if wide else 8192, True
    if "DeepSeek" in row.model:
        return 16384 if row.precision == "fp4" else 32768, True
    if "GLM" in row.model:
        return 32768 if row.system not in HOPPER else 8192, True
    return 16384 if row.system not in HOPPER else 8192, True


def _kernels(row: SiliconRow, layout: Layout) -> str | None:
    """TensorRT-LLM's TRTLLM backend and vLLM's FlashInfer MXFP8 experts: the kernels of SGLang's FlashInfer tables."""
    blackwell = row.system not in HOPPER
    if not blackwell:
        return None
    if row.engine == "trtllm" and "gpt-oss" not in row.model:
        # FP4 ran on TRTLLM kernels from the start (CUTLASS under attention DP), FP8 since 1.2.
        fp4 = row.precision == "fp4" and layout.attention_dp == 1
        return "sglang" if fp4 or (row.precision == "fp8" and version_of(row) >= (1, 2)) else None
    return "sglang" if row.engine == "vllm" and "gpt-oss" in row.model else None


def _kernel_version(row: SiliconRow) -> str | None:
    """Triton experts of vLLM until v0.18 (minimaxm2.5_fp8_b200.sh: VLLM_USE_FLASHINFER_MOE_FP8=0): v0.19's tables.

    From v0.19 on the scripts leave the choice to vLLM, which takes FlashInfer's on Blackwell.
    """
    early = row.engine == "vllm" and row.precision == "fp8" and (0,) < version_of(row) < (0, 19)
    return "0.19.0" if early and "MiniMax" in row.model and row.system in ("b200_sxm", "h200_sxm") else None


def _delayed(row: SiliconRow, layout: Layout) -> bool:
    """DELAY_BATCHING of dsr1_fp8_b200_trt.sh, in the script of release 1.2 (with TRTLLM as its MoE backend)."""
    fp8 = row.engine == "trtllm" and "DeepSeek" in row.model and row.precision == "fp8" and row.system not in HOPPER
    short = row.isl == row.osl == 1024 and (row.in_flight or 0) >= 64
    return fp8 and short and layout.attention_dp == 1 and benchmark(row) and version_of(row) >= (1, 2)


def _marlin(row: SiliconRow) -> bool:
    """vLLM's gpt-oss on Hopper: VLLM_MXFP4_USE_MARLIN=1 in gptoss_fp4_{h100,h200}.sh (#327, December 2025; #789)."""
    return row.engine == "vllm" and "gpt-oss" in row.model and row.system in HOPPER and benchmark(row)


def _poll(row: SiliconRow, concurrency: int) -> int:
    """SGLang's --scheduler-recv-interval: 30 from 16 requests in flight on, else 10, on Blackwell; 1 elsewhere."""
    if row.engine != "sglang" or row.system in HOPPER or "GLM" in row.model or not benchmark(row):
        return 1
    return 30 if concurrency >= 16 else 10
