"""The conformance suite: checks that every method passes, for any plugin.

``deltamux plugin check PACKAGE`` runs it; so does a test of three lines:

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
    @pytest.mark.parametrize("case", cases("mymethod"), ids=str)
    def test_mymethod_passes_every_check(case, check):
        check(case)
"""

from deltamux.conformance.cases import Case, Refused, cases
from deltamux.conformance.checks import CHECKS
from deltamux.conformance.serving import check_serving

__all__ = ["CHECKS", "Case", "Refused", "cases", "check_serving"]
