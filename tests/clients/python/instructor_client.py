"""instructor: https://python.useinstructor.com, its README and "Modes"."""

from collections.abc import Callable
from typing import Literal

import instructor
from checks import MODEL, URL, check, run_checks
from openai import OpenAI
from pydantic import BaseModel, Field

# The mode JSON only tells the model of the schema. So the question shows a small model what to write.
MESSAGES = [{"role": "user", "content": 'John is 25 and tall. Answer {"name": "John", "age": 25, "tall": true}'}]


class User(BaseModel):
    name: Literal["John", "Ann"]
    age: int = Field(ge=0, le=120)
    tall: bool


def client_of(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=mode)


def extraction(mode: instructor.Mode) -> Callable[[], User]:
    def extract() -> User:
        user = client_of(mode).create(
            model=MODEL, response_model=User, messages=MESSAGES, temperature=0, max_tokens=200, max_retries=1
        )
        assert isinstance(user, User)
        return user

    return extract


for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
    check(mode.name)(extraction(mode))


@check("create_partial")
def partial() -> User:
    users = list(
        client_of(instructor.Mode.JSON_SCHEMA).create_partial(
            model=MODEL, response_model=User, messages=MESSAGES, temperature=0, max_tokens=200
        )
    )
    return User.model_validate(users[-1].model_dump())


@check("create_iterable")
def iterable() -> str:
    users = list(
        client_of(instructor.Mode.TOOLS).create_iterable(
            model=MODEL, response_model=User, messages=MESSAGES, temperature=0, max_tokens=400
        )
    )
    assert all(isinstance(user, User) for user in users)
    return f"{len(users)} users"


if __name__ == "__main__":
    run_checks()
