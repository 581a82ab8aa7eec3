"""Serving adapters: vLLM's connector, the front before it, and the validation of a server. Needs torch and safetensors.

vLLM, the web framework and the client's library are imported by the modules that use them, and by nothing else.
"""
