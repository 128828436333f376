"""Proof, from the PTX of a compiled `nf4_dot`, which elements Triton's pack=2 grouped.

Reads text only. Triton doesn't define the grouping. Another version might group other elements, and products would be
wrong without an error. Called once for every variant that is compiled for a GPU, and by the tests.
"""

import re

_PAIR = re.compile(r"// pair (%r\d+) (%r\d+) to (%r\d+) (%r\d+) (%r\d+) (%r\d+)")
_PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k16\S*\s+\{[^}]*\}, \{([^}]*)\}")


def ungrouped(ptx: str) -> list[str]:
    """Reasons why this PTX doesn't show pack=2 grouping the two halves of one word in the order of the products' k.

    An empty list is the proof. A comment in the PTX of the decode says which registers it got and filled. Both inputs
    must be one register: then the two elements are the two places of one word. All four registers of a product's left
    operand must come unchanged from the same output of four decodes. Their lower half is the even k (PTX ISA,
    m16n8k16), so the first element is the first place; otherwise Triton would have had to swap the halves.
    """
    wrong = []
    outputs: dict[str, int] = {}
    for first, second, *filled in _PAIR.findall(ptx):
        if first != second:
            wrong.append(f"a pair of two words: {first} {second}")
        for index, register in enumerate(filled):
            if register in outputs:
                wrong.append(f"{register} is filled twice")
            outputs[register] = index
    products = [[r.strip() for r in operand.split(",")] for operand in _PRODUCT.findall(ptx)]
    if not outputs or not products:
        wrong.append(f"{len(outputs)} decoded registers, {len(products)} products")
    for operand in products:
        if len(operand) != 4 or len({outputs.get(r, r) for r in operand}) != 1 or operand[0] not in outputs:
            wrong.append(f"a left operand that is not decoded as it stands: {operand}")
    used = {r for operand in products for r in operand}
    return wrong + [f"{r} is decoded for nothing" for r in outputs.keys() - used]
