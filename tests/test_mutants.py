"""The mutants of `tests.mutants` are up to date with the source and with the tests that find them."""

import ast
from collections import Counter

from .mutants import MUTANTS
from .mutants.mutant import ROOT


def test_each_applies_once_and_is_still_python():
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
    stale = []
    for mutant in MUTANTS:
        source = (ROOT / "vis_sparse" / mutant.file).read_text()
        try:
            changed = mutant.apply(source)
        except ValueError as error:
            stale.append(str(error))
        else:
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant.name
    assert not stale, "tests/mutants:\n" + "\n".join(stale)


def test_the_tests_named_beside_them_exist():
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for test in mutant.tests:
            file, _, function = test.partition("[")[0].partition("::")
            assert (ROOT / "tests" / file).is_file(), test
            assert f"def {function}(" in (ROOT / "tests" / file).read_text() or not function, test
