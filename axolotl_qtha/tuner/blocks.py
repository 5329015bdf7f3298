"""Into how many circuits a rank is cut: side by side, each with its share of the bottleneck's numbers, one for each qubit."""

from __future__ import annotations

from ..circuit.ansatz import MAX_QUBITS
from ..errors import refusal

ONE_CIRCUIT = 8  # up to this rank one circuit has it all
SMALLEST, USUAL, LARGEST = 3, 4, 8  # qubits of several


def usual_qubits(rank: int) -> int | None:
    """Return the qubits of a circuit where the settings name none; None where the rank cannot be cut.

    A circuit of q qubits costs 2**q for each of its numbers and token: above rank 8 it is the divisor nearest to 4.

    >>> [usual_qubits(rank) for rank in (8, 16, 32, 12, 10, 11, 13)]
    [8, 4, 4, 4, 5, 11, None]
    """
    if rank <= ONE_CIRCUIT:
        return rank
    divisors = [qubits for qubits in range(SMALLEST, LARGEST + 1) if rank % qubits == 0]
    if divisors:
        return min(divisors, key=lambda qubits: (abs(qubits - USUAL), qubits))
    return rank if rank <= MAX_QUBITS else None


def check(rank: int, qubits: int | None, quantum: str, has_circuit: bool) -> None:
    """Check that circuits of so many qubits have a rank between them.

    Args:
        rank: numbers of the bottleneck.
        qubits: of each circuit; None where the settings name none.
        quantum: the branch.
        has_circuit: whether it runs circuits, which are simulated up to `MAX_QUBITS`.

    Raises:
        ValueError: naming `qubits`, or a rank that cannot be cut with its neighbours that can.
    """
    if quantum == "product":
        return  # circuits of one qubit, whatever the rank; `qubits` beside it is refused as idle
    if qubits is None:
        if has_circuit and usual_qubits(rank) is None:
            below, above = (next(filter(usual_qubits, around)) for around in (range(rank - 1, 0, -1), range(rank + 1, 4 * rank)))
            why = (
                f"is neither a multiple of {SMALLEST} to {LARGEST} qubits, to cut it into circuits, nor at most the {MAX_QUBITS} "
                f"that `quantum: {quantum}` can simulate as one"
            )
            own = next((n for n in range(MAX_QUBITS, 1, -1) if rank % n == 0), None)
            asked = f", `qubits: {own}` with this rank" if own else ""
            raise refusal("rank", rank, why, f"`rank: {below}` or `rank: {above}`{asked}, or `quantum: none` with any rank")
        return
    if not isinstance(qubits, int) or isinstance(qubits, bool) or qubits < 1:
        raise refusal("qubits", qubits, "is not a positive whole number", f"`qubits: {usual_qubits(rank) or rank}`")
    works = ", ".join(f"`qubits: {n}`" for n in range(1, MAX_QUBITS + 1) if rank % n == 0)
    if rank % qubits:
        raise refusal("qubits", qubits, f"does not divide rank {rank}, which circuits of equal size share", works)
    if qubits > MAX_QUBITS and (has_circuit or qubits != rank):  # a classical network of the whole rank costs no more
        raise refusal("qubits", qubits, f"is more than the {MAX_QUBITS} that a circuit can have", works)
