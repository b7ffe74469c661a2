"""Registers that ptxas gives away while a product of Hopper reads them, in SASS written by hand."""

from types import SimpleNamespace

import pytest

from kvops.autotune import inspect
from kvops.autotune.register_operands import overwritten_operands


def sass(*lines: str) -> str:
    return "\n".join(f"        /*{16 * number:04x}*/    {line} ;" for number, line in enumerate(lines))


PRODUCT = "HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR16].tnspB, R88, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("write", "registers"),
    [
        ("FADD R121, R4, R5", [121]),
        ("FADD R124, R4, R5", []),
        ("FADD R4, R120, R121", []),
        ("LDS.128 R116, [R4]", []),
        ("LDS.128 R120, [R4]", [120, 121, 122, 123]),
        ("IMAD.WIDE R122, R4, 0x4, R6", [122, 123]),
        ("SHFL.BFLY PT, R120, R4, 0x1, 0x1f", [120]),
        ("ISETP.GE.AND P0, PT, R120, R4, PT", []),
        ("STS [R4], R120", []),
        ("@!P1 MOV R123, R4", [123]),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT", []),
        ("HGMMA.64x128x16.F32.BF16 R60, gdesc[UR20], RZ, !UPT", [120, 121, 122, 123]),
    ],
)
def test_a_write_to_an_operand_before_the_wait_is_found(write, registers):
    early = overwritten_operands(sass(PRODUCT, write, WAIT, "EXIT"))
    assert [line.split(" writes R")[1].split(",")[0] for line in early] == [str(register) for register in registers]
    assert overwritten_operands(sass(PRODUCT, WAIT, write, "EXIT")) == []


def test_a_wait_that_leaves_groups_under_way_leaves_their_operands():
    later = PRODUCT.replace("R120", "R140")
    lines = (PRODUCT, later, WAIT.replace("0x0", "0x1"))
    assert overwritten_operands(sass(*lines, "MOV R120, RZ", "EXIT")) == []
    assert len(overwritten_operands(sass(*lines, "MOV R140, RZ", "EXIT"))) == 1
    # A product whose group is not committed yet is not waited for.
    open_group = PRODUCT.replace(", gsb0", "")
    assert len(overwritten_operands(sass(open_group, WAIT, "MOV R120, RZ", "EXIT"))) == 1


def test_a_write_on_the_way_around_a_loop_is_found():
    body = ("MOV R120, RZ", PRODUCT, "@P0 BRA 0x0", WAIT, "EXIT")
    (line,) = overwritten_operands(sass(*body))
    assert line == "0x0000 MOV writes R120, which HGMMA at 0x0010 reads"
    assert overwritten_operands(sass("MOV R120, RZ", PRODUCT, WAIT, "@P0 BRA 0x0", "EXIT")) == []
    # Behind an unconditional branch nothing follows.
    assert overwritten_operands(sass(PRODUCT, "BRA 0x30", "MOV R120, RZ", WAIT, "EXIT")) == []


def test_such_a_binary_is_refused_when_it_is_compiled(monkeypatch):
    monkeypatch.setattr(inspect, "_cuobjdump", lambda: "cuobjdump")

    def listing(text):
        monkeypatch.setattr(inspect.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text + " REG:9 STACK:0"))
        return inspect._nvidia_facts(b"")

    assert listing(sass(PRODUCT, WAIT, "MOV R120, RZ", "EXIT"))["registers"] == 9
    with pytest.raises(RuntimeError, match="TRITON_PTXAS_PATH"):
        listing(sass(PRODUCT, "MOV R120, RZ", WAIT, "EXIT"))
