"""OpenAI's API over an engine, on the device: `flashhead serve`. No torch.

`requests` reads what a client sends, `texts` decodes in one thread and in fair turns, `answers` has the forms that go back, `app` the
routes, `guard` what stands before them, `run` the process.
"""
