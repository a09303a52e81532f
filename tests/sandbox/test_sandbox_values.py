"""Programs and tests behind two pipes meet as they would in one process: values, functions, iterators, errors."""

import pytest

from remix_cli.sandbox.outside import Program, Verdict, judge


def judged(program: str, test: str, prompt: str = "") -> Verdict:
    lines = "".join(f"    {line}\n" for line in test.splitlines())
    return judge(Program(program, "f", prompt, f"def check(f):\n{lines}"))


IMPORTS = "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
VALUES = """
for v in [
    range(1, 9, 3), deque([1, [2]], 5), Fraction(1, 10**50), Decimal("1.10"), bytearray(b"x"), Counter("aab"),
    OrderedDict([(2, 1), (1, 2)]), ([((1,),)], frozenset([(1, 2)])), {(1, (2, 3)): deque()},
    int, ValueError, type(None), defaultdict(list, {1: [2]}),
]:
    w = f(v)
    assert w == v and type(w) is type(v), (v, w)
    if not isinstance(v, (type, defaultdict)):
        w = f(repr(v))
        assert w == v and type(w) is type(v), (v, w)
assert f(deque([1], 3)).maxlen == 3
assert f(defaultdict(list))[0] == []
assert f(Decimal("1.10")).as_tuple().exponent == -2
assert f(OrderedDict([(2, 1), (1, 2)])) != OrderedDict([(1, 2), (2, 1)])
"""


def test_values_of_the_standard_library_cross_as_what_they_are():
    program = IMPORTS + "def f(x): return eval(x) if type(x) is str else x"
    assert judged(program, VALUES, IMPORTS) == Verdict(True, "", "")


SAME = "def f(*args): return args[0] if len(args) == 1 else args"
# title: program, test. Each holds where both share a process.
MEETINGS = {
    "an endless generator": (
        """
def f(n):
    while True:
        yield n
        n += 1
""",
        """
from itertools import islice
g = f(3)
assert next(g) == 3 and list(islice(g, 2)) == [4, 5] and g != [3]
""",
    ),
    "a map": ("def f(x): return map(str, x)", "assert list(f([1, 2])) == ['1', '2'] and f([1]) != ['1']"),
    "a zip of a text and a generator": (
        "def f(*x): return zip(*x)",
        "assert dict(f('ab', (i for i in range(2)))) == {'a': 0, 'b': 1}",
    ),
    "an iterator that both sides advance": (
        "def f(x): return next(x)",
        """
x = iter([1, 2, 3])
assert f(x) == 1 and list(x) == [2, 3]
""",
    ),
    "a generator that fails": (
        """
def f(x):
    yield 1
    raise KeyError(x)
""",
        """
g = f(5)
assert next(g) == 1
try: next(g)
except KeyError as e: assert e.args == (5,)
else: assert 0
""",
    ),
    "views of a dict": (
        "def f(d): return d.keys(), d.values(), d.items()",
        """
k, v, i = f({1: 2})
assert k == {1} and list(v) == [2] and (1, 2) in i and len(i) == 1
assert f({}.items() | {(1, 2)} and {3: 4})[0] == {3}
""",
    ),
    "a view as an argument": (
        "def f(k, v): return sorted(k), list(v)",
        "assert f({2: 1}.keys(), {2: 1}.values()) == ([2], [1])",
    ),
    "a function as a result": (
        "def f(x): return lambda y: x + y",
        "assert f(2)(3) == 5 and callable(f(2)) and f(2) != f(2)",
    ),
    "a function as an argument": (
        "def f(g, x): return sorted(map(g, x), key=g)",
        "assert f(lambda v: -v, [1, 3, 2]) == [-1, -2, -3] and f(abs, [-2, 1]) == [1, 2]",
    ),
    "a class as an argument and a result": (
        "def f(x, kind): return isinstance(x, kind), kind, type(x)",
        "assert f(1, int) == (True, int, int)",
    ),
    "a method that collects": (
        """
def f(call):
    for i in range(3): call(i)
""",
        """
seen = []
assert f(seen.append) is None and seen == [0, 1, 2]
""",
    ),
    "the function itself": ("def f(g, n): return n if n > 9 else g(g, n + 1)", "assert f(f, 0) == 10"),
    "one list as two arguments": (
        """
def f(a, b):
    a.append(1)
    return b, a is b
""",
        """
x = []
assert f(x, x) == ([1], True)
assert f([], []) == ([], False)
""",
    ),
    "rows that are one row": (
        "def f(n): return [[0] * n] * n",
        """
m = f(2)
m[0][0] = 1
assert m == [[1, 0], [1, 0]]
""",
    ),
    "an argument that comes back": (
        SAME,
        """
x = {'a': []}
x['me'] = x
assert f(x) is x and f(x['a']) is x['a']
""",
    ),
    "a tuple in a list in itself": (
        """
def f():
    t = ([],)
    t[0].append(t)
    return t
""",
        """
t = f()
assert t[0][0] is t
""",
    ),
    "a depth of 50,000": (
        SAME,
        """
x = []
for i in range(50000): x = [x] if i % 2 else (x,)
y, n = f(x, 1)[0], 0
while y: y, n = y[0], n + 1
assert n == 50000
""",
    ),
    "arguments that the program changes": (
        """
def f(x, d, s, b):
    x.sort()
    d.pop(1)
    s |= {7}
    b += b'!'
    x[0].append(d)
""",
        """
x, d, s, b = [[3], [1]], {1: 2, 3: 4}, {1}, bytearray(b'a')
one = x[1]
f(x, d, s, b)
assert x == [[1, {3: 4}], [3]] and x[0] is one and one[1] is d and s == {1, 7} and b == b'a!'
""",
    ),
    "arguments that stay as they are": (
        "def f(d): return len(d)",
        """
d = {1: 2, 3: 4}
assert [f(d) for k in d] == [2, 2]
""",
    ),
    "an argument changed before an error": (
        """
def f(x):
    x.append(1)
    raise ValueError
""",
        """
x = []
try: f(x)
except ValueError: assert x == [1]
else: assert 0
""",
    ),
    "errors of Python": (
        """
def f(x):
    if x < 0: raise ValueError('negative', x)
    return {}[x]
""",
        """
try: f(-1)
except ValueError as e: assert e.args == ('negative', -1)
else: assert 0
try: f(1)
except LookupError as e: assert type(e) is KeyError
else: assert 0
""",
    ),
    "errors of the program's own class": (
        """
class Odd(ArithmeticError):
    def __init__(self, n):
        super().__init__(f'{n} is odd')
        self.n = n
class Very(Odd): pass
def f(x): raise Very(x)
""",
        """
try: f(3)
except Odd as e: assert e.n == 3 and str(e) == '3 is odd' and isinstance(e, (Very, ArithmeticError))
else: assert 0
""",
    ),
    "errors of the standard library": (
        "import json\ndef f(x): return json.loads(x)",
        """
import json
try: f('{')
except json.JSONDecodeError as e: assert e.pos == 1
else: assert 0
""",
    ),
    "an error with an odd constructor": (
        "def f(x): return b'\\xff'.decode()",
        """
try: f(1)
except UnicodeDecodeError as e: assert e.start == 0
else: assert 0
""",
    ),
    "an error of the test's": (
        """
def f(g):
    try: g()
    except ValueError as e: return str(e)
""",
        """
def g(): raise ValueError('mine')
assert f(g) == 'mine'
""",
    ),
}


@pytest.mark.parametrize("title", MEETINGS)
def test_program_and_test_meet_as_in_one_process(title):
    assert judged(*MEETINGS[title]) == Verdict(True, "", "")


def test_the_error_class_of_the_prompt_is_the_one_that_a_test_expects():
    prompt = "class Empty(Exception):\n    def text(self): return f'empty: {self.args[0]}'\n"
    test = "try: f([])\nexcept Empty as e: assert e.text() == 'empty: 1'\nelse: assert 0"
    assert judged(prompt + "def f(x): raise Empty(1)", test, prompt) == Verdict(True, "", "")
    assert judged(prompt + "def f(x): raise KeyError(1)", test, prompt).reason == "KeyError: 1"
