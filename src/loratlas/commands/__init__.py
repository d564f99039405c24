"""The commands of `loratlas`, one a file. Heavy libraries are imported when a command runs, never at the top."""
