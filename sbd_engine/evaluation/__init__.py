"""Quality beside speed: questions with one exact answer, under several settings of one engine."""
