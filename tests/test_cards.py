"""cards.py: a card is known by its name, memory and multiprocessors, or not at all."""

import pytest

from onecard.cards import TABLE, card, similar


def test_ada_cards_have_the_peak_of_their_sms_and_boost_clock():
    for name, sms, ghz in (("RTX 4070", 46, 2.475), ("RTX 4090", 128, 2.52), ("RTX 4070 Ti SUPER", 66, 2.61)):
        assert card(name).sms == sms
        assert card(name).tflops == pytest.approx(sms * 512 * ghz / 1000, rel=0.005)


@pytest.mark.parametrize(
    "name, sms, row",  # sms: of the card in the machine; None: the name was typed
    [
        ("NVIDIA GeForce RTX 4070", 46, "RTX 4070"),
        ("4070 ti", None, "RTX 4070 Ti"),
        ("rtx4090", None, "RTX 4090"),
        ("4070TiSuper", None, "RTX 4070 Ti SUPER"),
        ("4060 Ti 16GB", None, "RTX 4060 Ti 16GB"),
        ("RTX 3090 24GB", None, "RTX 3090"),
        ("NVIDIA GeForce RTX 3080", 70, "RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 36, "RTX 4070 Laptop"),
        ("NVIDIA GeForce RTX 4090 D", 114, "RTX 4090 D"),
        ("NVIDIA A100-SXM4-80GB", 108, "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", 108, "A100"),
        ("NVIDIA H100 80GB HBM3", 132, "H100"),
        ("NVIDIA GH200 480GB", 132, "GH200"),
        ("Tesla T4", 40, "T4"),
        ("Tesla V100-PCIE-32GB", 80, "V100 PCIe 32GB"),
        ("NVIDIA RTX 6000 Ada Generation", 142, "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, "RTX PRO 6000"),
        ("AMD Instinct MI300X", 304, "MI300X"),
        ("7900 XTX", None, "RX 7900 XTX"),
    ],
)
def test_a_card_is_known_by_the_drivers_name_and_by_what_a_person_types(name, sms, row):
    assert card(name, sms).name == row


@pytest.mark.parametrize(
    "name, sms",
    [
        ("NVIDIA GeForce RTX 4070", 36),  # another chip under this name
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 188),  # slower clocks
        ("RTX 4070 8GB", None),
        ("RTX 6000", None),  # of which generation?
        ("NVIDIA GeForce RTX 9999", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_a_card_that_is_not_surely_in_the_table_is_unknown(name, sms):
    assert card(name, sms) is None


def test_cards_with_a_similar_name_are_offered():
    assert similar("RTX 4O70")[0] == "RTX 4070" and similar("RTX 6000")[0] == "RTX A6000"
    assert similar("4070 Tii")[0] == "RTX 4070 Ti" and similar("abc") == []


def test_the_memory_in_the_machine_decides_between_cards_of_one_name():
    name = "NVIDIA GeForce RTX 4060 Ti"  # the driver does not say 8 or 16 GB
    assert card(name, 34, int(15.6 * 2**30)).gib == 16 and card(name, 34, int(7.6 * 2**30)).gib == 8


def test_every_row_is_found_by_its_own_name():
    for name, (sms, tflops, gib) in TABLE.items():
        assert card(name) == (name, sms, tflops, gib)
