"""1-D windows of a token sequence."""


def window_runs(length: int, window: int, shift: int = 0) -> list[tuple[int, int, int]]:
    """Cut a sequence into consecutive windows, as runs of windows of one size.

    The window edges lie at shift, shift + window, shift + 2*window, ... What is left before the first edge and after
    the last one are shorter windows of their own. So no window joins the sequence's two ends, and none holds padding.

    Args:
        length: tokens L in the sequence.
        window: tokens S in a window.
        shift: first window edge, 0 <= shift < window.

    Returns:
        (start, count, size) of each run, in order and covering 0..L-1 once: at most three.
    """
    head = min(shift, length)
    count, tail = divmod(length - head, window)
    runs = [(0, 1, head), (head, count, window), (length - tail, 1, tail)]
    return [(start, n, size) for start, n, size in runs if n and size]
