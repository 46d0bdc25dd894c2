"""How the disaggregated deployments behind the measured rows were launched: pools, layouts, batch limits, drafts.

Read in `.github/configs/nvidia-master.yaml` of SemiAnalysisAI/InferenceX (commits 0004cf5f of March and 07d3a741, a
fork of May 2026) and InferenceMAX/InferenceMAX (525079ad, January 2026); concurrencies of H200, and that its prefill
workers at 8192 tokens run without attention DP, in the recipes of ishandhanani/srt-slurm (`recipes/trtllm/h200`,
4893f83e), which multiply those of the file names by the decode workers. The first FP8 runs on four GPUs of GB200 stand
as DEP4 with the note that scripts decide; they were TP, as later files have it: with attention on every GPU the weights
do not fit.

A group's head: family of models, system, engine, precision, start of the engine's version. Its lines: lengths,
concurrencies, prefill workers, decode workers, most running requests of a decode rank (- where the engine's default
stands), drafts. Layouts: TPn, TEPn (attention in TP, whole experts), DEPn (attention DP, whole experts), DPn (attention
DP, experts cut).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from validate.silicon.rows import Layout

_TABLE = """
deepseek b200_sxm trtllm fp4 0.8
1k1k 1214 1xDEP4 2xDEP8 64 mtp2; 875 1xDEP4 5xDEP8 16 mtp3; 6 1xDEP4 5xTEP8 1 mtp3
1k1k 10,15,25,45,90,180 1xDEP4 5xTEP8 32 mtp3; 4968 3xDEP4 4xDEP8 128 mtp1; 10860 3xDEP4 5xDEP4 512 mtp1
1k1k 4096 1xDEP4 1xDEP8 512; 2192 1xDEP4 2xDEP8 128; 1365 1xDEP4 5xDEP8 32; 6 1xDEP4 5xTEP8 1
1k1k 10,15,25,45,90,180 1xDEP4 5xTEP8 32; 450 1xDEP4 6xTEP8 64
8k1k 90 1xDEP4 1xDEP8 8 mtp3; 66 1xDEP4 3xTEP8 16 mtp3; 6 1xDEP4 5xTEP8 1 mtp3; 10,15,30,60 1xDEP4 5xTEP8 8 mtp3
8k1k 548 3xDEP4 1xDEP8 64 mtp3; 1096,1691 5xDEP4 1xDEP8 192 mtp1; 658 5xDEP4 2xDEP8 32 mtp3
8k1k 6 1xDEP4 5xTEP8 1; 10,15,25,50,100 1xDEP4 5xTEP8 8; 370 2xDEP4 5xTEP8 64; 1606 4xDEP4 1xDEP8 192
8k1k 837 4xDEP4 3xDEP8 32; 2222 7xDEP4 2xDEP8 128
deepseek b200_sxm trtllm fp8 0.8
1k1k 8 1xDEP8 8xTP8 1 mtp3; 32 1xDEP8 8xTP8 4 mtp3; 64 1xDEP8 8xTP8 8 mtp3; 256 1xDEP8 8xTP8 32 mtp3
1k1k 896 1xDEP8 7xDEP8 128 mtp3; 1024 1xDEP8 4xDEP8 256 mtp3; 1184 1xDEP8 3xDEP8 384 mtp3; 1600 1xDEP8 2xDEP8 768 mtp2
1k1k 4,32,128 1xDEP8 3xTP8 48; 1920 1xDEP8 5xDEP8 48; 4096 1xDEP8 1xDEP8 512; 5152 2xDEP8 5xDEP8 128
8k1k 8 1xDEP8 6xTP8 8 mtp3; 8 1xDEP8 2xTP8 32 mtp3; 48 1xDEP8 6xTP8 8 mtp3; 64 1xDEP8 4xTP8 16 mtp3
8k1k 224 2xDEP8 3xDEP8 8 mtp3; 288 2xDEP8 1xDEP8 32 mtp3; 1088 4xDEP8 1xDEP8 128 mtp2
8k1k 1 1xDEP8 1xTP8 1; 32,128 1xDEP8 4xTP8 32; 96 1xDEP8 6xTP8 16; 128 1xDEP8 1xDEP8 128; 128 1xDEP8 2xDEP8 64
8k1k 256 1xDEP8 1xDEP8 256; 640 2xDEP8 1xDEP8 640
deepseek b300_sxm trtllm fp4 0.8
1k1k 654 1xDEP2 1xDEP8 64 mtp3; 271 1xDEP2 2xDEP8 16 mtp3; 11 1xDEP2 5xTEP8 1 mtp3
1k1k 10,20,25,60,120,200 1xDEP2 5xTEP8 32 mtp3; 2342 2xDEP2 1xDEP8 256 mtp1; 8609 5xDEP2 2xDEP8 512 mtp1
1k1k 12926 5xDEP2 2xDEP8 768 mtp1
1k1k 1176 1xDEP2 2xDEP8 64; 6 1xDEP2 4xTEP8 1; 5,10,15,25 1xDEP2 5xTEP4 4; 60,110,195,395 1xDEP2 5xTEP8 64
1k1k 4405 2xDEP2 1xDEP8 512; 8192 3xDEP2 1xDEP8 1024; 4611 3xDEP2 2xDEP8 256
8k1k 2198 10xDEP2 1xDEP8 256 mtp1; 52 1xDEP2 4xTEP4 8 mtp3; 8 1xDEP2 4xTEP8 1 mtp3; 32 1xDEP2 4xTEP8 4 mtp3
8k1k 181 3xDEP2 1xDEP8 16 mtp3; 1197 9xDEP2 1xDEP8 128 mtp1
8k1k 105 1xDEP2 3xTEP4 32; 63 1xDEP2 3xTEP8 16; 4 1xDEP2 3xTEP8 1; 12 1xDEP2 4xTEP4 2; 589 5xDEP2 2xDEP8 32
8k1k 1093 6xDEP2 1xDEP8 128; 2048 8xDEP2 1xDEP8 256
deepseek b300_sxm trtllm fp8 0.8
1k1k 10 1xDP4 8xTP8 1 mtp3; 160 1xDP4 8xTP8 16 mtp3; 3072 1xDP4 1xDP8 256 mtp1; 2560 1xDP4 2xDEP8 128 mtp1
1k1k 720 1xDP4 5xDEP8 16 mtp2; 11264 3xDP4 2xDP8 512 mtp1
1k1k 2112 1xDP4 1xDEP8 256; 3072 1xDP4 2xDP8 128; 1280 1xDP4 3xDP8 48; 12,128,384 1xDP4 8xTP8 64
1k1k 16384 2xDP4 1xDP8 1024
8k1k 40 1xDP4 2xTP8 16 mtp3; 8 1xDP4 4xTP8 1 mtp3; 20 1xDP4 4xTP8 4 mtp3; 72 1xDP4 1xDP8 8 mtp3
8k1k 144 2xDP4 1xDP8 16 mtp3; 512 4xDP4 1xDP8 64 mtp2
8k1k 64 1xDP4 4xTP8 16; 16 1xDP4 8xTP8 2; 256 2xDP4 1xDP8 32; 512 3xDP4 1xDP8 64; 256 3xDP4 5xTP8 64
8k1k 1075 5xDP4 1xDP8 128; 3072 7xDP4 1xDEP8 384
deepseek h200_sxm trtllm fp8 0.8
1k1k 13 1xDEP8 11xTEP8 1 mtp3; 44,88,352 1xDEP8 11xTEP8 128 mtp3; 144 1xDEP8 9xTEP8 128 mtp3
1k1k 512 1xDEP8 8xDEP8 128 mtp3; 896 1xDEP8 7xDEP8 128 mtp3; 1024 1xDEP8 4xDEP8 128 mtp3; 1024 1xDEP8 2xDEP8 256 mtp1
1k1k 11 1xDEP8 9xTEP8 1; 36,72,144,288,576 1xDEP8 9xTEP8 256; 1152 1xDEP8 9xDEP8 512; 1536 1xDEP8 6xDEP8 512
1k1k 3584 2xDEP8 7xDEP8 512
8k1k 9 1xTEP8 7xTEP8 1 mtp3; 28 1xTEP8 7xTEP8 32 mtp3; 48 1xTEP8 6xTEP8 32 mtp3; 48 1xTEP8 3xTEP8 32 mtp2
8k1k 160 3xTEP8 5xTEP8 32 mtp3; 64 1xTEP8 1xDEP8 32 mtp2; 128 2xTEP8 1xDEP8 32 mtp2; 256 3xTEP8 1xDEP8 32 mtp2
8k1k 512 3xTEP8 1xDEP8 64 mtp1
8k1k 9 1xTEP8 7xTEP8 1; 28 1xTEP8 7xTEP8 32; 48 1xTEP8 6xTEP8 16; 48 1xTEP8 3xTEP8 32; 160 2xTEP8 5xTEP8 128
8k1k 192 2xTEP8 3xDEP8 128; 128 1xTEP8 1xDEP8 256; 768 5xTEP8 3xDEP8 256; 512 3xTEP8 1xDEP8 512
deepseek h100_sxm trtllm fp8 0.8
1k1k 6 1xDEP16 3xTEP16 1 mtp3; 9 1xDEP16 3xTEP16 2 mtp3; 30 1xDEP16 3xTEP16 8 mtp3; 60 1xDEP16 3xTEP16 16 mtp3
1k1k 117 1xDEP16 3xTEP16 32 mtp3; 231 1xDEP16 3xDEP16 4 mtp3; 462 1xDEP16 3xTEP16 128 mtp3
1k1k 615 1xDEP16 1xDEP16 32 mtp2; 1229 1xDEP16 1xDEP16 64 mtp1
1k1k 6 1xDEP16 3xTEP16 1; 9 1xDEP16 3xTEP16 2; 30 1xDEP16 3xTEP16 8; 60 1xDEP16 3xTEP16 16; 231 1xDEP16 3xDEP16 4
1k1k 462 1xDEP16 3xDEP16 8; 924 1xDEP16 3xDEP16 16; 1845 1xDEP16 3xDEP16 32; 4916 2xDEP16 1xDEP16 256
8k1k 6 1xDEP16 3xTEP16 1 mtp3; 9 1xDEP16 3xTEP16 2 mtp3; 30 1xDEP16 3xTEP16 8 mtp3; 77 1xDEP16 1xDEP16 4 mtp3
8k1k 154 2xDEP16 1xDEP16 8 mtp3
8k1k 6 1xDEP16 3xTEP16 1; 9 1xDEP16 3xTEP16 2; 30 1xDEP16 3xTEP16 8; 154 1xDEP16 2xTEP16 64; 308 2xDEP16 1xDEP16 16
deepseek gb200 trtllm fp4 0.8
1k1k 180 1xDEP4 1xDEP32 4 mtp3; 4,8,12,24,48 1xDEP4 4xTEP8 8 mtp3; 4301 2xDEP4 1xDEP16 256 mtp1
1k1k 2253 3xDEP4 1xDEP32 64 mtp1; 16130 3xDEP4 5xDEP4 768 mtp1
1k1k 4301 1xDEP4 1xDEP8 512; 666 1xDEP4 1xDEP32 16; 6144 1xDEP4 2xDEP4 768; 12,24,48,96,192 1xDEP4 4xTEP8 32
1k1k 5 1xDEP4 4xTEP8 1; 4301 2xDEP4 1xDEP16 256; 2253 2xDEP4 1xDEP32 64
1k8k 4,8,12,24,48 1xDEP4 7xTEP8 4 mtp3; 7 1xDEP4 7xTEP8 1 mtp3; 128 1xDEP4 1xDEP32 4 mtp3; 512 1xDEP4 1xDEP32 16 mtp3
1k8k 3072 1xDEP4 3xDEP16 64 mtp3; 6144 1xDEP4 3xDEP16 128 mtp1; 8192 1xDEP4 1xDEP32 256 mtp1
1k8k 5 1xDEP4 7xTEP8 1; 60 1xDEP4 15xTEP4 4; 135 1xDEP4 15xTEP4 8; 563 1xDEP4 1xDEP32 16; 2048 1xDEP4 1xDEP32 64
1k8k 4096 1xDEP4 1xDEP32 128; 8192 1xDEP4 1xDEP32 256
8k1k 4,8,12,24,48 1xDEP4 4xTEP8 8 mtp3; 180 3xDEP4 1xDEP32 4 mtp3; 1229 7xDEP4 1xDEP16 64 mtp1
8k1k 666 8xDEP4 1xDEP32 16 mtp3; 4301 11xDEP4 1xDEP16 256 mtp1
8k1k 12,44,76 1xDEP4 4xTEP8 16; 5 1xDEP4 4xTEP8 1; 333 2xDEP4 1xDEP32 8; 1229 7xDEP4 1xDEP32 32
8k1k 2253 8xDEP4 1xDEP16 128; 4096 10xDEP4 1xDEP16 256
deepseek gb200 trtllm fp4 0.5
1k1k 1,2,4,8,16,36 1xTEP4 4xTEP8 32 mtp3; 512,1075 1xDEP4 1xDEP16 64 mtp3; 2150 2xDEP4 1xDEP16 128 mtp1
1k1k 512 1xDEP4 1xDEP32 16 mtp3; 2252 1xDEP4 1xDEP8 256 mtp1
1k1k 1,2,4,8,16,32,64,141 1xTEP4 4xTEP8 128; 1075 1xDEP4 1xDEP32 32; 1075 1xDEP4 1xDEP16 64
1k1k 2048,4300 2xDEP4 1xDEP16 256; 4300 1xDEP4 1xDEP8 512
8k1k 1,2,4,8,18 1xTEP4 3xTEP8 16 mtp3; 128,269 5xDEP4 1xDEP32 8 mtp3; 538 8xDEP4 1xDEP32 16 mtp3
8k1k 1075 8xDEP4 1xDEP16 64 mtp2; 2150 6xDEP4 1xDEP8 256 mtp1
8k1k 1,2,4,8,16,34 1xTEP4 3xTEP8 32; 256,538 4xDEP4 1xDEP32 16; 1075 6xDEP4 1xDEP16 64; 2150 8xDEP4 1xDEP16 128
8k1k 2150 5xDEP4 1xDEP8 256
deepseek gb200 trtllm fp8 0.8
1k1k 4301 1xDEP8 1xDEP8 512 mtp1; 2151 1xDEP8 1xDEP8 256 mtp1; 1229 1xDEP8 1xDEP16 64 mtp1; 615 1xDEP8 1xDEP32 16 mtp3
1k1k 36 1xDEP8 3xTEP8 8 mtp3; 18 1xDEP8 3xTEP8 4 mtp3; 9 1xDEP8 3xTEP8 2 mtp3
1k1k 6144 1xDEP8 1xDEP8 768; 4301 1xDEP8 1xDEP8 512; 2151 1xDEP8 1xDEP16 128; 1127 1xDEP8 1xDEP32 32
1k1k 256 1xDEP8 1xDEP32 8; 27 1xDEP8 3xTEP8 8; 3 1xDEP8 3xTEP8 1
1k8k 8192 1xDEP8 2xDEP16 256 mtp1; 2152 1xDEP8 2xDEP16 64 mtp1; 564 1xDEP8 1xDEP32 16 mtp3; 72 1xDEP8 1xDEP32 2 mtp3
1k8k 4,8 1xDEP8 4xTEP8 2 mtp3; 8192 1xDEP8 2xDEP16 256; 2048 1xDEP8 1xDEP32 64; 564 1xDEP8 1xDEP32 16
1k8k 36 1xDEP8 4xTEP8 8; 4 1xDEP8 4xTEP8 1
8k1k 666 3xDEP8 1xDEP8 64 mtp3; 666 5xDEP8 1xDEP16 32 mtp3; 333 3xDEP8 1xDEP16 16 mtp3; 333 4xDEP8 1xDEP32 8 mtp3
8k1k 90 2xDEP8 1xDEP32 2 mtp3; 15 1xDEP8 3xTEP8 4 mtp3; 6 1xDEP8 3xTEP8 2 mtp3
8k1k 1229 5xDEP8 1xDEP16 64; 666 4xDEP8 1xDEP32 16; 615 3xDEP8 1xDEP16 32; 333 2xDEP8 1xDEP32 8
8k1k 63 1xDEP8 3xTEP8 16; 18 1xDEP8 3xTEP8 4; 6 1xDEP8 3xTEP8 1
deepseek gb300 trtllm fp4 0.8
1k1k 3226 1xDEP2 1xDEP4 768 mtp1; 333 1xDEP2 1xDEP32 8 mtp3; 5 1xDEP2 4xTEP8 1 mtp3; 8,12,24,48 1xDEP2 4xTEP8 8 mtp3
1k1k 2253 3xDEP2 1xDEP16 128 mtp1; 1229 3xDEP2 1xDEP32 32 mtp3
1k1k 5 1xDEP2 4xTEP8 1; 12,48,96,192 1xDEP2 4xTEP8 32; 8192 2xDEP2 1xDEP8 1024; 1229 2xDEP2 1xDEP32 32
1k1k 4301 3xDEP2 1xDEP16 256; 2253 3xDEP2 1xDEP32 64
1k8k 7 1xDEP2 7xTEP8 1 mtp3; 63 1xDEP2 7xTEP8 8 mtp3; 563 1xDEP2 1xDEP32 16 mtp3; 2088 1xDEP2 1xDEP32 64 mtp3
1k8k 8192 1xDEP2 2xDEP16 256 mtp1; 16384 1xDEP2 4xDEP8 512 mtp1
1k8k 7 1xDEP2 7xTEP8 1; 60 1xDEP2 15xTEP4 4; 245 1xDEP2 7xTEP8 32; 1024 1xDEP2 1xDEP32 32; 4096 1xDEP2 1xDEP32 128
1k8k 8192 1xDEP2 1xDEP32 256
8k1k 33 1xDEP2 3xTEP8 8 mtp3; 5 1xDEP2 4xTEP8 1 mtp3; 12,24 1xDEP2 4xTEP8 4 mtp3; 180 4xDEP2 1xDEP32 4 mtp3
8k1k 308 8xDEP2 1xDEP32 8 mtp3; 2253 10xDEP2 1xDEP8 256 mtp1; 666 10xDEP2 1xDEP16 32 mtp3; 1127 13xDEP2 1xDEP16 64 mtp3
8k1k 72 1xDEP2 3xTEP8 16; 5 1xDEP2 4xTEP8 1; 12 1xDEP2 4xTEP8 2; 5,15,30 1xDEP2 5xTEP4 4; 666 7xDEP2 1xDEP32 16
8k1k 1229 9xDEP2 1xDEP16 64; 3228 11xDEP2 3xDEP4 256; 2253 14xDEP2 1xDEP16 128
deepseek gb300 trtllm fp8 0.8
1k1k 8 1xDEP4 4xTEP8 1 mtp3; 24 1xDEP4 4xTEP8 4 mtp3; 180 1xDEP4 1xDEP32 4 mtp3; 564 2xDEP4 1xDEP32 16 mtp3
1k1k 666 1xDEP4 1xDEP16 32 mtp3; 2253 2xDEP4 1xDEP16 128 mtp1; 8192 3xDEP4 2xDEP8 512 mtp1
1k1k 4 1xDEP4 4xTEP8 1; 24 1xDEP4 4xTEP8 4; 84 1xDEP4 4xTEP8 16; 1229 2xDEP4 1xDEP32 32; 2253 2xDEP4 1xDEP16 128
1k1k 8602 3xDEP4 2xDEP8 512; 12288 3xDEP4 2xDEP8 768
8k1k 8 1xDEP4 4xTEP8 1 mtp3; 24 1xDEP4 4xTEP8 4 mtp3; 333 6xDEP4 1xDEP32 8 mtp3; 666 8xDEP4 1xDEP16 32 mtp3
8k1k 1229 10xDEP4 1xDEP16 64 mtp1; 1229 7xDEP4 1xDEP8 128 mtp1
8k1k 4 1xDEP4 4xTEP8 1; 24 1xDEP4 4xTEP8 4; 36 1xDEP4 4xTEP8 8; 512 6xDEP4 1xDEP32 16; 666 4xDEP4 1xDEP16 32
8k1k 1229 7xDEP4 1xDEP16 64; 2151 7xDEP4 1xDEP8 256
1k8k 4 1xDEP4 4xTEP8 1 mtp3; 16 1xDEP4 4xTEP8 4 mtp3; 141 1xDEP4 1xDEP32 4 mtp3; 544 1xDEP4 1xDEP32 16 mtp3
1k8k 2048 1xDEP4 2xDEP16 64 mtp1; 8192 1xDEP4 4xDEP8 256 mtp1
1k8k 4 1xDEP4 4xTEP8 1; 36 1xDEP4 4xTEP8 8; 282 1xDEP4 1xDEP32 8; 1024 1xDEP4 1xDEP32 32; 4096 1xDEP4 2xDEP16 128
1k8k 8192 1xDEP4 2xDEP16 256
deepseek gb200 sglang fp8 0.5.8
1k1k 4,8 1xTP4 1xTP4 128; 1024,2048,4096 3xDEP8 1xDEP48 -; 1024,2048,4096,6144 2xDEP8 1xDEP32 -; 4096 1xDEP8 1xDEP8 -
8k1k 4,8,16 1xTP8 1xTP8 128; 512,1024,2048,6144 5xDEP8 1xDEP32 -; 2048,4096,6144 6xDEP8 1xDEP24 -
deepseek gb200 sglang fp8 0.5.5
1k1k 4096 2xDEP8 1xDEP32 -; 2,4,8,16,64,128 1xTP4 4xTP4 -; 1024,2048,4096 3xDEP8 1xDEP48 -
8k1k 4,8,16,32 1xTP4 1xTP4 -; 512,1024,2048,6144 5xDEP8 1xDEP32 -
deepseek gb200 sglang fp4 0.5.8
1k1k 4,8,32 1xTP4 2xTP4 -; 512,2048,4096,8192 4xDEP4 1xDEP32 -; 2048,4096 4xDEP4 1xDEP48 -
8k1k 4,8 1xTP4 4xTP4 -; 512,2048,4096 6xTP4 1xDEP48 -; 2048 10xTP4 1xDEP32 -
deepseek gb200 sglang fp4 0.5.5
1k1k 4,8,32,64 1xDEP4 2xDEP4 -; 512,1024,2048,4096,8192 4xDEP4 1xDEP48 -; 8192,12000,15000 4xDEP4 1xDEP32 -
8k1k 4,8,32,64 1xTP4 4xDEP4 -; 512,1024,2048,4096 6xTP4 1xDEP48 -; 1024,2048,8192 10xDEP4 1xDEP32 -
deepseek gb300 sglang fp8 0.5.8
1k1k 4,8,16,32 1xTP4 4xTP4 -; 1024,2048,4096,6144 2xDEP8 1xDEP32 -; 4096,7168,7680 1xDEP8 1xDEP8 -
8k1k 4,8 1xTP4 1xTP4 -; 128,256,512,1024 5xDEP8 1xDEP32 -; 2048,4096 6xDEP8 1xDEP24 -
deepseek gb300 sglang fp4 0.5.8
1k1k 4,8,32 1xTP4 2xTP4 -; 512,2048,4096,8192 4xDEP4 1xDEP32 -; 512,2048,4096,8192 4xDEP4 1xDEP48 -
8k1k 4,8,32,64 1xTP4 4xTP4 -; 512,2048,4096 6xTP4 1xDEP48 -; 2048 10xTP4 1xDEP32 -
deepseek h200_sxm sglang fp8 0.5.8
1k1k 1,4,8,16,32,64,128,256 1xTP8 9xTP8 -; 512,1024,2048 1xTP8 6xTP8 -; 128,256,512,1024,2048 1xDEP8 6xDEP8 -
1k1k 1,4,8,16,32,64,128,256 1xTP8 9xTP8 - mtp2; 512,1024,2048 1xTP8 6xTP8 - mtp2
1k1k 128,256,512,1024,2048 1xDEP8 6xDEP8 - mtp2
8k1k 1,4,8 1xTP8 7xTP8 -; 4,8,16 1xTP8 6xTP8 -; 8,16,32 1xTP8 3xTP8 -; 32,64,128 2xTP8 3xTP8 -
8k1k 64,128,256 1xTP8 1xDEP8 -
8k1k 1,4,8 1xTP8 7xTP8 - mtp2; 2,4,8,16,32 1xTP8 6xTP8 - mtp2; 4,8,16,32,64 1xTP8 3xTP8 - mtp2
8k1k 32,64,128 2xTP8 3xTP8 - mtp2; 32,64,128,256,512 1xTP8 1xDEP8 - mtp2
deepseek h100_sxm sglang fp8 0.5.8
1k1k 1,2,4,8,16,32,64,128 1xTP16 2xTP16 -; 1,2,4,8,16,32,64 1xTP16 1xDEP16 -
1k1k 1,2,4,8,16,32,64,128 1xTP16 2xTP16 - mtp2; 1,2,4,8,16,32,64 1xTP16 1xDEP16 - mtp2
1k8k 1,2,4,8,16,32 1xTP16 2xTP16 -; 1,2,4,8 1xTP16 1xDEP16 -
1k8k 1,2,4,8,16,32,64 1xTP16 2xTP16 - mtp2; 1,2,4,8,16,32,64 1xTP16 1xDEP16 - mtp2
8k1k 1,2,4,8,16,32,64,128 1xTP16 1xTP16 -; 1,2,4,8,16,32,64 1xTP16 1xDEP16 -
8k1k 1,2,4,8,16,32,64,128 1xTP16 1xTP16 - mtp2; 1,2,4,8,16,32,64 1xTP16 1xDEP16 - mtp2
deepseek b200_sxm sglang fp4 0.5.8
1k1k 16,128 1xDEP4 5xTEP8 -; 32,64,256 1xDEP4 6xTEP8 -; 512 1xDEP4 1xDEP8 -; 512 1xDEP4 2xDEP8 -
8k1k 64,128 1xDEP4 1xTEP8 -; 8 1xDEP4 5xTEP8 -; 4,128 2xDEP4 5xTEP8 -; 4,8,16,64 1xTP4 1xTP8 -
8k1k 1024,2048 7xDEP4 2xDEP8 -
deepseek b200_sxm sglang fp8 0.5.8
1k1k 4 1xTEP8 1xTEP8 -; 16,32,64,128,256 1xTEP8 3xTEP8 -; 1024,2048,4096 1xDEP8 5xDEP8 -; 2048,4096 2xDEP8 5xDEP8 -
1k1k 4,64 1xTEP8 1xTEP8 - mtp2; 4,8,16,32,128 1xTEP8 3xTEP8 - mtp2; 512,4096 1xDEP8 5xDEP8 - mtp2
1k1k 1024,2048,4096 2xDEP8 5xDEP8 - mtp2
8k1k 4,32,64,512 1xTEP8 1xTEP8 -; 64,512 1xTEP8 4xTEP8 -; 32 1xTEP8 6xTEP8 -; 128,512,1024 1xDEP8 1xDEP8 -
8k1k 256,512,1024 2xDEP8 1xDEP8 -
kimi gb200 trtllm fp4 -
1k1k 4,192,360,668 1xDEP4 4xTEP8 128; 5,15,30,55 1xDEP4 5xTEP4 8; 666 1xDEP4 1xDEP16 32; 2253 1xDEP4 1xDEP32 64
1k1k 4301,6452 1xDEP4 1xDEP8 768; 4301 2xDEP4 1xDEP16 256; 4301 2xDEP4 1xDEP32 128
8k1k 4 1xDEP4 4xTEP8 1; 156 1xDEP4 4xTEP4 32; 5,15,30,60,105 1xDEP4 5xTEP4 16; 333 2xDEP4 1xDEP16 16
8k1k 615 3xDEP4 1xDEP16 32; 2151 5xDEP4 1xDEP8 256; 2253 7xDEP4 1xDEP16 128
kimi gb200 vllm fp4 -
1k1k 256,512,1024,2048,3072,4096 1xDEP4 1xDEP16 -; 4,8,16,32,64,128 1xDEP4 4xTEP4 -
8k1k 4,8,16,32,128 1xDEP4 4xTEP4 -; 512,1024 3xDEP4 1xDEP16 -; 2048 5xDEP4 1xDEP8 -; 3072,4096 6xDEP4 1xDEP16 -
gpt-oss gb200 trtllm fp4 -
1k1k 1,2,4,16,32,64,128 1xTP1 1xTP4 256; 16 1xTP1 4xTP2 32; 256,512,1024,2048,2560 1xTP1 1xDEP2 1536
1k1k 512,1024,2048,2560 1xTP1 2xDEP2 1536; 256,1024,1536 1xTP1 1xDEP4 512; 3072 1xTP1 3xDEP4 1024
8k1k 1 1xTP1 1xTP8 4; 2,4,8,16,32,64 1xTP1 1xTP4 128; 128,512 2xTP1 1xTP4 1024; 256,384 2xTP1 1xTP2 512
8k1k 128,512 2xTP1 1xDEP2 512
"""
_TOKENS = {"1": 1024, "8": 8192}


@dataclass(frozen=True)
class Workers:
    """A pool: how many workers, and the layout of each."""

    count: int
    layout: Layout


@dataclass(frozen=True)
class Launch:
    """One deployment. running: most requests of a decode rank, None where the engine's default stands.

    drafts: tokens that multi-token prediction drafts in a step; 0 = none.
    """

    family: str
    system: str
    engine: str
    precision: str
    version: str
    isl: int
    osl: int
    concurrency: tuple[int, ...]
    prefill: Workers
    decode: Workers
    running: int | None
    drafts: int


def layout_named(name: str) -> Layout:
    """The layout of a name as DEP8; see the top of this module."""
    kind = name.rstrip("0123456789")
    size = int(name[len(kind) :])
    return {
        "TP": Layout(size, 1, 1, size, 1),
        "TEP": Layout(size, 1, 1, 1, size),
        "DEP": Layout(1, 1, size, 1, size),
        "DP": Layout(1, 1, size, size, 1),
    }[kind]


@cache
def launches() -> tuple[Launch, ...]:
    """All known launches."""
    found, head = [], [""] * 5
    for line in _TABLE.strip().splitlines():
        first, rest = line.split(" ", 1)
        if "k" not in first or not first[0].isdigit():
            head = line.split()
            continue
        for text in rest.split("; "):
            concurrency, prefill, decode, *more = text.split()
            drafts = int(more.pop()[3:]) if more[-1].startswith("mtp") else 0
            running = None if more[0] == "-" else int(more[0])
            lengths = _TOKENS[first[0]], _TOKENS[first[2]]
            many = tuple(int(part) for part in concurrency.split(","))
            one = Launch(
                head[0], head[1], head[2], head[3], head[4].rstrip("-"), lengths[0], lengths[1], many,
                _workers(prefill), _workers(decode), running, drafts,
            )  # fmt: skip
            found.append(one)
    return tuple(found)


def _workers(text: str) -> Workers:
    count, name = text.split("x")
    return Workers(int(count), layout_named(name))
