"""What the paper (arXiv 2411.12364) prints, digit by digit, by the preset that stands for the row.

Text where the number of digits counts: ours is compared after rounding to as many.
"""

_X10 = "ablation-151m-x10-"

TABLE_1 = {
    "dense-151m": ("0.15", "0.30"),
    "moe-151m-2in32": ("2.04", "0.35"),
    "ultramem-151m-x12": ("2.03", "0.35"),
    "dense-680m": ("0.68", "1.36"),
    "moe-680m-2in33": ("8.95", "1.50"),
    "ultramem-680m-x12": ("8.93", "1.49"),
    "dense-1.6b": ("1.61", "3.21"),
    "moe-1.6b-2in34": ("21.36", "3.52"),
    "ultramem-1.6b-x12": ("21.41", "3.50"),
    "dense-6.5b": ("6.44", "12.88"),
}
"""Parameters and FLOPs per token, both in 1e9."""

TABLE_2 = {
    "pkm-151m-x10": ("173.01", "1.534", "346.06"),
    _X10 + "no-softmax": ("173.01", "1.534", "346.06"),
    _X10 + "half-value-dim": ("178.47", "1.529", "356.98"),
    _X10 + "share-query": ("173.46", "1.529", "346.96"),
    _X10 + "split-skip": ("161.64", "1.536", "323.32"),
    _X10 + "qk-norm": ("161.64", "1.536", "323.54"),
    _X10 + "ive": ("172.37", "1.536", "344.98"),
    _X10 + "tdqkr": ("172.37", "1.536", "344.98"),
    _X10 + "mcs": ("172.37", "1.536", "344.98"),
    _X10 + "init": ("172.37", "1.536", "344.98"),
    _X10 + "value-lr": ("172.37", "1.536", "344.98"),
    _X10 + "query-conv": ("172.38", "1.536", "345.02"),
}
"""Dense parameters in 1e6, sparse in 1e9, FLOPs per token in 1e6."""

TABLE_3 = {
    "E = 4": "6.6",
    "E = 9": "14.9",
    "E = 16": "26.4",
    "r = 2": "0.001",
    "r = 3": "0.002",
    "r = 4": "0.003",
    "h = 2": "0.001",
    "h = 4": "0.003",
    "h = 8": "0.007",
}
"""Change of FLOPs in percent against E = 1, r = 1, h = 1, by what is changed."""

FIGURE_1C = {16: "18.1", 64: "18.8", 256: "17.3", 1024: "13.0"}
"""MoE's weight bytes over UltraMem's, by batch size, 1.6B models."""

TABLE_1_LOSS = {
    "dense-151m": 2.96,
    "moe-151m-2in32": 2.63,
    "ultramem-151m-x12": 2.67,
    "dense-680m": 2.64,
    "moe-680m-2in33": 2.39,
    "ultramem-680m-x12": 2.37,
    "dense-1.6b": 2.49,
    "moe-1.6b-2in34": 2.30,
    "ultramem-1.6b-x12": 2.24,
    "dense-6.5b": 2.30,
}
"""Validation losses, nats per token: MoE is ahead at 151M, UltraMem from 680M on."""

TABLE_2_LOSS = {
    "pkm-151m-x10": 2.828,
    _X10 + "no-softmax": 2.822,
    _X10 + "half-value-dim": 2.800,
    _X10 + "share-query": 2.803,
    _X10 + "split-skip": 2.788,
    _X10 + "qk-norm": 2.789,
    _X10 + "ive": 2.772,
    _X10 + "tdqkr": 2.764,
    _X10 + "mcs": 2.761,
    _X10 + "init": 2.758,
    _X10 + "value-lr": 2.736,
    _X10 + "query-conv": 2.736,
}
"""Validation losses, nats per token."""

TABLE_3_LOSS = {
    _X10 + "qk-norm": 2.789,  # E = 1
    _X10 + "ive": 2.772,  # E = 4, r = 1
    _X10 + "e9": 2.764,
    _X10 + "e16": 2.762,
    _X10 + "tdqkr": 2.764,  # r = 2, h = 1
    _X10 + "r3": 2.7636,
    _X10 + "r4": 2.7638,
    _X10 + "mcs": 2.761,  # h = 2
    _X10 + "h4": 2.765,
    _X10 + "h8": 2.770,
}
"""Validation losses, nats per token."""
