"""Random JSON schemas with most of what can be enforced, small enough that random texts come to an end."""

from collections.abc import Callable
from random import Random
from typing import Any

PATTERNS = ("^[a-c]{1,3}$", "x[0-9]+y?", "^(ja|nein)$", r"^\d{2}:\d{2}$", "[A-Z][a-z]{0,4}")
FORMATS = ("date", "time", "date-time", "ipv4", "uuid", "email", "duration")
NAMES = ("a", "b", "name", "size", "é", 'q"uote', "with space", "back\\slash", "$ref", "")


class RandomSchemas:
    """`schema()` gives one after the other; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._names_in_defs: list[str] = []

    def schema(self) -> dict[str, Any]:
        """A whole schema, now and then with definitions that refer to each other."""
        random = self._random
        self._names_in_defs = [f"d{i}" for i in range(random.randrange(3))]
        definitions = {name: self._object(2) for name in self._names_in_defs}
        schema = self._object(3) if random.random() < 0.7 else self._make(3)
        if definitions:
            schema["$defs"] = definitions
        if random.random() < 0.2:
            schema["title"], schema["description"] = "T", "said by nobody"
        return schema

    def _make(self, depth: int) -> dict[str, Any]:
        random = self._random
        kinds: list[Callable[[int], dict[str, Any]]] = [self._string, self._number, self._small]
        if depth > 0:
            kinds += [self._object, self._array, self._any_of, self._nullable, self._all_of]
        if self._names_in_defs and depth > 0:
            kinds += [self._ref]
        return random.choice(kinds)(depth)

    def _small(self, _: int) -> dict[str, Any]:
        values: list[Any] = ["x", "ü€", 'say "hi"', "", 0, -1, 2.5, True, False, None, [1, "a"], {"k": [None]}, 10**15]
        match self._random.randrange(4):
            case 0:
                return {"type": "boolean"}
            case 1:
                return {"type": "null"}
            case 2:
                return {"const": self._random.choice(values)}
            case _:
                return {"enum": self._random.sample(values, self._random.randint(1, 4))}

    def _string(self, _: int) -> dict[str, Any]:
        random = self._random
        match random.randrange(4):
            case 0:
                least = random.randrange(3)
                return {"type": "string", "minLength": least, "maxLength": least + random.randrange(6)}
            case 1:
                return {"type": "string", "pattern": random.choice(PATTERNS)}
            case 2:
                return {"type": "string", "format": random.choice(FORMATS)}
            case _:
                return {"type": "string", "maxLength": 5}

    def _number(self, _: int) -> dict[str, Any]:
        random = self._random
        low, size = random.randint(-50, 50), random.randint(1, 500)
        if random.random() < 0.6:
            schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + size}
            if random.random() < 0.3:
                schema["multipleOf"] = random.choice((1, 2, 3))
                schema["maximum"] = low + 2 * size + 6
            return schema
        least, most = random.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
        return {"type": "number", least: low, most: low + size}

    def _object(self, depth: int) -> dict[str, Any]:
        random = self._random
        names = random.sample(NAMES, random.randint(0, 4))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._make(depth - 1) for name in names},
            "required": [name for name in names if random.random() < 0.6],
        }
        match random.randrange(5):
            case 0:
                schema["additionalProperties"] = self._make(0)
            case 1:
                schema["patternProperties"] = {"^x-": self._make(0)}
                schema["additionalProperties"] = False
            case _:
                schema["additionalProperties"] = False
        if not schema["required"]:
            del schema["required"]
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        random = self._random
        least = random.randrange(3)
        schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + random.randrange(3)}
        if random.random() < 0.3:
            schema["prefixItems"] = [self._make(depth - 1) for _ in range(random.randint(1, 2))]
        schema["items"] = self._make(depth - 1)
        return schema

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._make(depth - 1) for _ in range(self._random.randint(1, 3))]}

    def _all_of(self, depth: int) -> dict[str, Any]:
        return {"allOf": [self._make(depth - 1), {"description": "nothing more"}]}

    def _nullable(self, _: int) -> dict[str, Any]:
        return {"type": self._random.choice((["string", "null"], ["integer", "null"])), "maxLength": 4, "maximum": 99}

    def _ref(self, _: int) -> dict[str, Any]:
        return {"$ref": "#/$defs/" + self._random.choice(self._names_in_defs)}
