"""EBNF: what is understood, and errors with line and column."""

from __future__ import annotations

import pytest

from everytoken.constraints.grammar import Grammar, GrammarError

from ..common import accepts, compile_


def language(source, root="root"):
    compiled = compile_(Grammar.from_ebnf(source, root))
    return lambda text: accepts(compiled, text)


def test_everything_at_once():
    inside = language(
        """
        # a comment
        root ::= "{" pair ("," pair)* "}"   # another
        pair ::= key ":" value
        key  ::= [a-z_] [a-z0-9_]{0,5}
        value ::= number | '"' [^"\\\\\\n]* '"'
               | list
        list ::= "[" (value ("," value)*)? "]"
        number ::= "-"? ("0" | [1-9] [0-9]*)
        """
    )
    assert inside('{a:1,b_2:"x y",c:[1,[],["é😀"]]}')
    for bad in ("{}", "{a:01}", "{abcdefg:1}", '{a:"\n"}', "{a:1"):
        assert not inside(bad)


def test_escapes_ranges_and_repetitions():
    inside = language(r'root ::= "\x41\u00e9\U0001F600\n\"" [\x30-\x39\]\-]{2} "a"{3,} "b"{1,2}')
    assert inside('Aé😀\n"1]aaab') and inside('Aé😀\n"--aaaabb') and not inside('Aé😀\n"11aab')
    assert language("root ::= . . ")("é😀")
    assert language("start ::= 'x'", "start")("x")
    assert language("root ::= ")("")
    assert language('root ::= "a" | ')("") and language('root ::= "a" | ')("a")


def test_direct_left_recursion_is_rewritten():
    inside = language('root ::= root "+" term | term\nterm ::= term "*" [0-9] | [0-9]')
    assert inside("1") and inside("1+2*3+4") and not inside("+1") and not inside("1+")
    assert language('root ::= root | "a"')("a")


@pytest.mark.parametrize(
    ("source", "inside", "outside"),
    [
        ('root ::= a "x" | "y"\na ::= root "z" | "w"', ["y", "wx", "yzx", "wxzx", "yzxzx"], ["", "wz", "yz", "x"]),
        ('root ::= a\na ::= b\nb ::= a | "x"', ["x"], ["", "xx"]),
        ('root ::= b root "x" | "y"\nb ::= "c"?', ["y", "yx", "cyx", "ccyxx"], ["cy", "yc"]),
        (
            'root ::= call | "(" root ")"\ncall ::= path "()" | name\npath ::= root "." name | call\nname ::= [a-z]{1,20}',
            ["f", "f()", "f()()", "f.g()", "(f).g()", "f.g().h()"],
            ["f.g", "()", "f.()", "f("],
        ),
    ],
)
def test_left_recursion_through_other_rules_is_rewritten(source, inside, outside):
    holds = language(source)
    assert all(map(holds, inside)) and not any(map(holds, outside))


def test_left_recursion_through_an_empty_rule_is_refused_by_name():
    long = "|".join(f'"c{n}"' for n in range(20))
    with pytest.raises(GrammarError, match="left-recursive through a rule that may be empty: root"):
        compile_(Grammar.from_ebnf(f'root ::= b root "x" | b "y"\nb ::= ({long})?'))


@pytest.mark.parametrize(
    ("source", "message", "line", "column"),
    [
        ('root ::= "a', "literal is not closed", 1, 10),
        ('root ::= "a"\nx ::= [a-', "class is not closed", 2, 7),
        ('root ::= ("a"', "group is not closed", 1, 10),
        ('root ::= "a")', "unbalanced", 1, 13),
        ('root ::= "a"\n\n  root ::= "b"', "defined twice", 3, 3),
        ('root ::= nmber\nnumber ::= "1"', "not defined", 1, 10),
        ("root ::= *", "nothing to repeat", 1, 10),
        ('root ::= "a"{2,1}', "swapped", 1, 13),
        ('root ::= "a"{x}', "repetition range", 1, 13),
        (r'root ::= "\q"', "unknown escape", 1, 11),
        ("root ::= [z-a]", "swapped", 1, 11),
        ("root ::= []", "empty character class", 1, 10),
        ('= "a"', "rule was expected", 1, 1),
        ("root ::= @", "unexpected", 1, 10),
    ],
)
def test_errors_have_line_and_column(source, message, line, column):
    with pytest.raises(GrammarError, match=message) as caught:
        Grammar.from_ebnf(source)
    assert f"line {line}, column {column}" in str(caught.value)


def test_hints():
    with pytest.raises(GrammarError, match="Did you mean 'number'"):
        Grammar.from_ebnf('root ::= nmber\nnumber ::= "1"')
    with pytest.raises(GrammarError, match="no rule 'root'"):
        Grammar.from_ebnf('main ::= "a"')
    with pytest.raises(GrammarError, match="empty"):
        Grammar.from_ebnf("  # nothing\n")


def test_unsatisfiable_grammars_are_found_when_compiled():
    for source in ('root ::= "a" root', "root ::= x\nx ::= y\ny ::= x x", 'root ::= "(" root ")" | root root'):
        with pytest.raises(GrammarError, match=r"No text|left-recursive"):
            compile_(Grammar.from_ebnf(source))
    partly = language('root ::= "a" | "b" never\nnever ::= "x" never')
    assert partly("a") and not partly("b")


def test_deep_nesting_is_an_error_and_long_chains_are_not():
    with pytest.raises(GrammarError, match="nested deeper"):
        Grammar.from_ebnf("root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000)
    chain = "\n".join(f"r{n} ::= r{n + 1}" for n in range(3000))
    assert language(f'root ::= r0\n{chain}\nr3000 ::= "x"')("x")
    doubling = "\n".join(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(40))
    compiled = compile_(Grammar.from_ebnf(f'root ::= r0\n{doubling}\nr40 ::= "x"'))
    from everytoken.constraints.engine.matcher import GrammarMatcher

    assert GrammarMatcher(compiled).accept_string("x" * 5000)  # of 2^40


@pytest.mark.slow
def test_bounded_repetitions_beyond_unrolling():
    compiled = compile_(Grammar.from_ebnf('root ::= "a"{99990,100003} "b"'))
    for count, inside in ((99_989, False), (99_990, True), (100_000, True), (100_003, True), (100_004, False)):
        assert accepts(compiled, "a" * count + "b") == inside
    billions = compile_(Grammar.from_ebnf('root ::= "ab"{0,1000000000}'))
    assert accepts(billions, "ab" * 1000) and accepts(billions, "") and not accepts(billions, "aba")
    least = compile_(Grammar.from_ebnf('root ::= "a"{1000000000,}'))
    assert not accepts(least, "a" * 10_000)


def test_union_and_concatenation():
    one, two = Grammar.from_choices(["yes", "no"]), Grammar.from_regex("[0-9]+")
    either, both = compile_(Grammar.union(one, two)), compile_(Grammar.concat(one, Grammar.from_regex(": "), two))
    assert accepts(either, "yes") and accepts(either, "42") and not accepts(either, "yes42")
    assert accepts(both, "no: 7") and not accepts(both, "no")
    with pytest.raises(GrammarError, match="no grammar"):
        Grammar.union()
    with pytest.raises(GrammarError, match="choices is empty"):
        Grammar.from_choices([])
