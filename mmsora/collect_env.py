"""What a bug report needs to say of a machine: ``python -m mmsora.collect_env``."""

from mmsora.utils.environment import collect_env

__all__ = ["collect_env"]

if __name__ == "__main__":
    for subject, description in collect_env().items():
        print(f"{subject:14}{description}")
