from typing import Any

def use(name: str) -> tuple[str, bool]: ...
def matrix(weights: int, scales: int, bias: int, columns: int, k: int) -> Any: ...
def experts(
    kind: int,
    activation: int,
    alpha: float,
    limit: float,
    experts: int,
    hidden: int,
    inner: int,
    gate_up: Any,
    down: Any,
) -> Any: ...
def run_experts(
    experts: Any,
    hidden: int,
    offsets: int,
    experts_of_pairs: int,
    weights: int,
    out: int,
    rows: int,
    pairs: int,
    threads: int,
) -> bool: ...
def run_product(
    kind: int, matrix: Any, rows: int, count: int, out: int, out_f32: bool, columns: int, threads: int
) -> None: ...
