"""Texts that JSON allows and texts that it does not, after the grammar of RFC 8259.

Each stands as the value in a line `{"v": …}`, unless it is one of the lines.
"""


def split(words: str) -> list[str]:
    "Words between blanks."
    return words.split()


CONTROLS = [chr(code) for code in range(1, 32) if code != 10]

NO_NUMBERS = split(
    "+1 01 -01 00 -00 007 -012 1. -1. 0. -0. .5 -.5 . -. 2.e3 0.e1 .e1 9.e+ 1e 1e+ 1e- 1E 0e 0E+ 1.0e 0.3e+ 1ee2 1eE2 "
    "1e1e1 1e2.5 1e++1 1e+-1 0x1F 0xg 0b1 0o7 1_000 1a 1f 1L 1n 12px --1 -- - + +-1 ++1 1.2.3 1..2 -1x -foo 1/2 1% "
    "$1 #1 (1) '1' `1` ½ ∞ １ १ ٣ 1² 1,5 Inf inf nan -nan NaN -NaN +NaN NAN Infinity -Infinity +Infinity infinity -Inf")
NO_NUMBERS += ["1 2", "- 1", "1 .5", "1. 5", "1 e5", "1e 5", "1\xa02", "\u20091"]

NO_LITERALS = split(
    "True False None TRUE FALSE NULL Null nil undefined yes no tru fals nul t f n truee falsee nulll true1 "
    "true,false !true @ * & % ~ ? : ; = void true|false (true) <true> tRue ｔrue null? null. -true -null +false")
NO_LITERALS += ["", " ", "true false", "null null", "tr ue"]

NO_STRINGS = [
    "abc", "'a'", "`a`", "“a”", "«a»", '"a', 'a"', '"', '""a', 'a""', '"a" "b"', '"a""b"', '"a"b', '"\\', '"\\"',
    "\"a'", r'"\x41"', r'"\a"', r'"\v"', r'"\e"', r'"\0"', r'"\1"', r'"\ "', '"\\\'"', r'"\`"', r'"\(a\)"',
    r'"\U00000041"', r'"\N{DASH}"', r'"\u"', r'"\u1"', r'"\u12"', r'"\u123"', r'"\u12G4"', r'"\uG123"', r'"\u{41}"',
    r'"\u 041"', r'"\u-041"', r'"\u+041"', r'"\u004٣"', r'"\ud800"', r'"\uDBFF"', r'"\udc00"', r'"\uDFFF"',
    r'"\ud800\ud800"', r'"\udc00\ud800"', r'"\ud800x"', r'"x\ud800"', r'"\ud800\u0041"', r'"\ud800\\udc00"',
    r'"\ud83d \ude00"', r'r"a"', r'b"a"', r'f"a"', r'u"a"', '"\\\t"', '"\\é"', '\\"a\\"', '&quot;a&quot;', '"a" + "b"',
    '"""a"""',
    *(f'"a{char}b"' for char in CONTROLS)]

NO_ARRAYS = [
    "[", "]", "[1", "1]", "[1,", "[1,]", "[,1]", "[,]", "[1,,2]", "[1 2]", "[1;2]", "[1:2]", "[1}", "{1]", "[[1]",
    "[1]]", "[a]", "[-]", "[...]", "[*]", '["a" 1]', '["a",', '["a', "[tru]", "[1.]", "[1,NaN]", "[][]", "[1]1", "<1>",
    "[1|2]", "[1 /* one */]", "[1] // one", "[1] # one", "[\xa01]", "[\u20281]", "[\ufeff1]", "[\x0b1]", "[\x0c1]"]

NO_OBJECTS = [
    "{", "}", "{}}", "{{}", "{,}", "{:}", '{"a"}', '{"a":}', '{"a" 1}', '{"a",1}', '{"a":1,}', '{,"a":1}',
    '{"a":1,,"b":2}', '{"a":1 "b":2}', '{"a":1;"b":2}', '{"a"::1}', "{:1}", "{1:2}", "{a:1}", "{'a':1}", "{null:1}",
    "{true:1}", "{[]:1}", "{{}:1}", '{"a":1', '"a":1}', '{"a"=1}', '{"a"=>1}', '{"a"->1}', '{"a": /**/ 1}',
    '{"a":1} x', '{"a":1}}', "{...}", '{"a":1]', '["a":1]', '{"a":1,"a":2}', '{"a":1,"\\u0061":2}',
    '{"a":{"b":1,"b":1}}', '{"a":"b}', '{"a:1}', '{a":1}', '{"a":1,"b"}', '{"a":1,"b":}', '{"a":1,b:2}', '{"a" :1 ,}',
    '{"a":\x0b1}', '{"a":\xa01}', '{"a":(1)}', '{"a":1}{"b":2}', "{1}", '{"a", "b"}']

NO_LINES = [
    "[]", "[1]", "1", '"a"', "null", "true", '{"v":1}{"v":2}', '{"v":1} {"v":2}', '{"v":1},', ',{"v":1}', '{"v":1};',
    '{"v":1}]', '[{"v":1}', '{"v":1}//', '// {"v":1}', '# {"v":1}', '/* {"v":1} */', 'data: {"v":1}', '\xa0{"v":1}',
    '{"v":1}\xa0', '\u2028{"v":1}', '\x0c{"v":1}', "({'v':1})", "<v>1</v>", "v: 1", "v=1", "- v", "v", "{'v': 1}",
    '\\{"v":1}', '{"v":1}\\n', '{"v":1}%', '"{"v":1}"', "{" * 100, "[" * 100, '{"v":' * 70 + "1" + "}" * 70,
    '{"v":' + "[" * 70 + "]" * 70 + "}"]

NO_UTF8 = [b'"\xff"', b'"\xfe\xff"', b'"\x80"', b'"\xc0\xaf"', b'"\xc1\x81"', b'"\xe2\x82"', b'"\xe0\x80\xaf"',
b'"\xed\xa0\x80"',
           b'"\xed\xbf\xbf"', b'"\xf5\x80\x80\x80"', b'"\xf4\x90\x80\x80"', b'"\xf0\x80\x80\xaf"', b'"\xf0\x9f\x98"',
           b'"\xe9"', b'"a\x00b"', b"\x001"]

GOOD_NUMBERS = split(
    "0 -0 1 -1 10 -10 123 1.5 -1.5 0.5 0.0 -0.0 1e5 1E5 1e+5 1e-5 1E+5 1E-5 0e0 0E0 0e+1 0E-1 1.0e2 -1.0E-2 20e1 "
    "1e00 1e01 123.456e78 5e-324 1.7976931348623157e308 9007199254740993 -9223372036854775808 18446744073709551616 "
    "0.1 1e-9 123456789012345678901234567890 -123456789012345678901234567890 0.1000000000000000055511151231257827")

GOOD_STRINGS = [
    '""', '" "', '"a"', '"é"', '"日本語"', '"😀"', '"\u2028\u2029"', '"\x7f"', '"\x85"', '"\ufeff"', '"\uffff"',
    '"\U0010ffff"', r'"\""', r'"\\"', r'"\/"', r'"/"', r'"\b"', r'"\f"', r'"\n"', r'"\r"', r'"\t"', r'"\u0041"',
    r'"\u00e9"', r'"\uABCD"', r'"\uabcd"', r'"\ud83d\ude00"', r'"\uD83D\uDE00"', r'"\ud800\udc00"', r'"\udbff\udfff"',
    r'"\\ud800"', r'"\\u0000"', r'"\u2028"', r'"\uffff"', r'"\u007f"', r'"\u001f"', r'"\u0001"', r'"\\\""', r'"a\\"',
    r'"\u005C"', r'"\u0022"', '"/* a */"', '"// a"', '"# a"', '"NaN"', '"{"', '"[1,]"', '"e\u0301"', '"\u202eabc"',
    "\"it's\"", '"٣"']

GOOD_STRUCTURES = [
    "null", "true", "false", "[]", "{}", "[ ]", "{ }", "[1]", "[1,2]", "[ 1 , 2 ]", "[\t1\t,\t2\t]", "[[]]", "[{}]",
    "[[],[[]]]", '{"a":1}', '{ "a" : 1 }', '{"":1}', '{" ":1}', '{"a":1,"b":2}', '{"a":1,"A":2}', '{"a":{"a":1}}',
    '[{"a":1},{"a":2}]', '{"\\u0061":1}', '{"a\\"b":1}', '{"é":1}', '{"v":[null,true,false]}', "[" * 60 + "]" * 60,
    '{"a":' * 60 + "1" + "}" * 60, '[1,[2,{"a":[3]}],"4"]', '{"a":[]}', '{"\\\\":1}', '{"__proto__":1}', '[""]']

GOOD_LINES = ['{"v":1}', ' {"v":1}', '{"v":1} ', '\t{"v":1}\t', '{"v":1}\r', ' \t {"v" : 1} \t \r', '{}', '{ }',
'{"v":1,"w":2}']


def line(value: str | bytes) -> bytes:
    "A line whose value is this text."
    return b'{"v": ' + (value if isinstance(value, bytes) else value.encode()) + b"}"


BAD = [line(text) for text in NO_NUMBERS + NO_LITERALS + NO_STRINGS + NO_ARRAYS + NO_OBJECTS + NO_UTF8]
BAD += [text.encode() for text in NO_LINES]
GOOD = [line(text) for text in GOOD_NUMBERS + GOOD_STRINGS + GOOD_STRUCTURES] + [text.encode() for text in GOOD_LINES]
