"""OpenAI's fine-tuning API: files, jobs and the deletion of models, over `server.training.jobs`.

Only this room reads multipart bodies, and only in `upload.py`. May import the rooms of the API below the routes, and
`server.training.jobs`. Start with `jobs.py`; `common.py` has what all its routes share.
"""
